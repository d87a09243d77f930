"""The scores as a table for the terminal."""

from collections.abc import Mapping

from hkd_bench.score.judge import Score


def text_table(scores: Mapping[str, Score]) -> str:
    """A row a setup (or COCO figure), a column a detection file; per cent."""
    first = next(iter(scores.values()))
    if first.precision:
        rows = [[name, *(_percent(one.precision[name]) for one in scores.values())] for name in first.precision]
        head = ["COCO, %", *scores]
    else:
        rows = [
            [name, str(rate.people), *(_percent(one.rates[name].value) for one in scores.values())]
            for name, rate in first.rates.items()
        ]
        head = ["MR^-2, %", "people", *scores]
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [head, *rows]
    )


def _percent(value: float) -> str:
    """-1 stands for nobody of that kind."""
    return "-" if value < 0 else f"{100 * value:.2f}"
