"""The scores as a table for the terminal."""

from collections.abc import Mapping

from hkd_bench.score.judge import ScoreResult


def format_score_table(scores: Mapping[str, ScoreResult]) -> str:
    """A row a setup (or COCO figure), a column a detection file; per cent."""
    first = next(iter(scores.values()))
    if first.coco_metrics:
        rows = [
            [name, *(_format_score_percent(one.coco_metrics[name]) for one in scores.values())]
            for name in first.coco_metrics
        ]
        head = ["COCO, %", *scores]
    else:
        rows = [
            [name, str(rate.num_gt), *(_format_score_percent(one.miss_rates[name].value) for one in scores.values())]
            for name, rate in first.miss_rates.items()
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


def _format_score_percent(value: float) -> str:
    """-1 stands for nobody of that kind."""
    return "-" if value < 0 else f"{100 * value:.2f}"
