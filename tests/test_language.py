"""Rules of language and structure: words, docstring sections, names, family checks, references, number of modules.

Every check prints its offenders as file:line and is tested with a snippet that breaks the rule.
"""

import ast
import re
import subprocess
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = [ROOT / "hkd_det", ROOT / "deploy" / "hkd_deploy", ROOT / "benchmarks" / "hkd_bench"]

FORBIDDEN_WORDS = (
    "pictures?|films?|nobody|somebody|whoever|told|tells|heard|hears|anew|learnt|doubles|lessons?|verdicts?|judges?|"
    "judged|reckons?|reckoned"
)
FORBIDDEN_PATTERN = re.compile(rf"(?<![a-z])({FORBIDDEN_WORDS})(?![a-z])", re.IGNORECASE)
RESULT_SECTION = re.compile(r"^\s*(Returns|Yields):", re.MULTILINE)
MIN_DOCUMENTED_RATIO = 0.9
MAX_MODULES = 210  # a feature that needs more modules raises it with a reason; the layout began with 150
MAX_SHORT_MODULES, SHORT_MODULE_LINES = 15, 40
# Interfaces of plug-ins: several modules define them with the same signature, and the caller selects a module.
PLUGIN_INTERFACES = {"main", "evaluate", "add_arguments"}
FAMILY_BASE = "BaseDetector"
# Modules that may test for a model family or an output type.
FAMILY_MODULES = ("hkd_det/models/", "hkd_det/distill/batch.py")
ERROR_CLASSES = {
    "BlockError",
    "DataError",
    "DatasetError",
    "HkdError",
    "LoginError",
    "ParityError",
    "PrecisionError",
    "UnavailableError",
    "UsageError",
}
REMEDY_NAME = re.compile(r"hint|suggest_names?\b", re.IGNORECASE)
MESSAGE_FORM = re.compile(r".*\S: (.*\b(expected|requires?)\b.*[.?]|.*\. \S.*[.?]|.*{hint})", re.DOTALL)
OUTSIDE_REFERENCES = ("../" + "shared", "/work" + "/")
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def list_modules(directories: Iterable[Path]) -> list[Path]:
    return sorted(path for directory in directories for path in directory.rglob("*.py"))


def format_place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{line}"


def iterate_words(text: str, path: Path, first_line: int) -> Iterator[str]:
    for match in FORBIDDEN_PATTERN.finditer(text):
        line = first_line + text.count("\n", 0, match.start())
        yield f"{format_place(path, line)}: {match[0]}"


def find_words_in_module(path: Path) -> list[str]:
    """List forbidden words in docstrings, string constants and comments of a module."""
    offenders: list[str] = []
    if not FORBIDDEN_PATTERN.search(path.read_text(encoding="utf-8")):
        return offenders
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            offenders += iterate_words(node.value, path, node.lineno)
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                offenders += iterate_words(token.string, path, token.start[0])
    return offenders


def find_words_in_text(path: Path) -> list[str]:
    """List forbidden words in a text file."""
    return list(iterate_words(path.read_text(encoding="utf-8"), path, 1))


def get_base_names(node: ast.ClassDef) -> set[str]:
    return {ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases}


def iterate_public_functions(paths: Sequence[Path]) -> Iterator[tuple[str, str, FunctionNode, ast.ClassDef | None]]:
    """Yield place, qualified name, node and class of all public functions and methods.

    Methods that override a method of a class in `paths` are left out: the base class documents them.
    """
    nodes = [(path, node) for path in paths for node in parse(path).body]
    classes = {node.name: node for _, node in nodes if isinstance(node, ast.ClassDef)}
    for path, node in nodes:
        if isinstance(node, FunctionNode) and not node.name.startswith("_"):
            yield format_place(path, node.lineno), node.name, node, None
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            inherited = list_inherited_methods(node, classes)
            for method in node.body:
                if not isinstance(method, FunctionNode) or method.name in inherited:
                    continue
                if method.name == "__init__" or not method.name.startswith("_"):
                    yield format_place(path, method.lineno), f"{node.name}.{method.name}", method, node


def list_inherited_methods(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """List the names of the methods, except the constructor, that the base classes in `classes` define."""
    methods: set[str] = set()
    bases, visited = get_base_names(node), set[str]()
    while found := (bases & classes.keys()) - visited:
        visited |= found
        for name in found:
            methods |= {method.name for method in classes[name].body if isinstance(method, FunctionNode)}
            bases |= get_base_names(classes[name])
    return methods - {"__init__"}


def has_decorator(node: FunctionNode, *names: str) -> bool:
    texts = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(text.rpartition(".")[2] in names for text in texts)


def count_arguments(node: FunctionNode, is_method: bool) -> int:
    arguments = node.args
    num_named = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
    num_variadic = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return num_named + num_variadic - (is_method and not has_decorator(node, "staticmethod"))


def find_undocumented_arguments(paths: Sequence[Path]) -> tuple[list[str], int]:
    """List functions with arguments and without `Args:`, and count the functions with arguments."""
    offenders, num_functions = [], 0
    for place, name, node, cls in iterate_public_functions(paths):
        if has_decorator(node, "overload", "setter") or count_arguments(node, cls is not None) == 0:
            continue
        num_functions += 1
        docstring = ast.get_docstring(node) or ""
        if cls and node.name == "__init__":  # the class documents its constructor
            docstring += ast.get_docstring(cls) or ""
        if "Args:" not in docstring:
            offenders.append(f"{place}: {name} has no Args:")
    return offenders, num_functions


def find_undocumented_results(paths: Sequence[Path]) -> tuple[list[str], int]:
    """List functions with a result and without `Returns:` or `Yields:`, and count the functions with a result.

    A summary such as "Return ..." or "Run ... and return ..." documents the result. Properties have no section.
    """
    offenders, num_functions = [], 0
    for place, name, node, _ in iterate_public_functions(paths):
        result = ast.unparse(node.returns) if node.returns else "None"
        is_property = has_decorator(node, "overload", "property", "cached_property", "setter")
        if result in ("None", "NoReturn", "Never") or is_property:
            continue
        num_functions += 1
        docstring = ast.get_docstring(node) or ""
        summary = docstring.partition("\n")[0]
        if not re.search(r"\b(return|yield)\b", summary, re.IGNORECASE) and not RESULT_SECTION.search(docstring):
            offenders.append(f"{place}: {name} has no Returns:")
    return offenders, num_functions


def list_family_types(models: Path) -> set[str]:
    """List the classes of `models` that are a model family, a teacher or an output type."""
    classes = [node for path in list_modules([models]) for node in parse(path).body if isinstance(node, ast.ClassDef)]
    families = {FAMILY_BASE}
    while new := {node.name for node in classes if get_base_names(node) & families} - families:
        families |= new
    outputs = {node.name for node in classes if node.name.endswith(("Outputs", "Teacher", "DetectionBatch"))}
    return families | outputs


def find_family_checks(path: Path, types: set[str]) -> list[str]:
    """List `isinstance`, `issubclass` and `match` on a type of `types`."""
    offenders = []
    for node in ast.walk(parse(path)):
        tested: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("isinstance", "issubclass") and len(node.args) == 2:
                tested = [node.args[1]]
        elif isinstance(node, ast.MatchClass):
            tested = [node.cls]
        for expression in tested:
            names = {part.id for part in ast.walk(expression) if isinstance(part, ast.Name)}
            names |= {part.attr for part in ast.walk(expression) if isinstance(part, ast.Attribute)}
            offenders += [f"{format_place(path, expression.lineno)}: {name}" for name in sorted(names & types)]
    return offenders


def find_duplicate_names(paths: Iterable[Path]) -> list[str]:
    """List public classes and functions whose name is defined in more than one module."""
    places = defaultdict(list)
    for path in paths:
        for node in parse(path).body:
            if isinstance(node, FunctionNode | ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(format_place(path, node.lineno))
    return [
        f"{name}: {', '.join(found)}"
        for name, found in sorted(places.items())
        if len(found) > 1 and name not in PLUGIN_INTERFACES
    ]


def format_template(message: ast.expr) -> str:
    """Return the text of a string or f-string with `{}` for each value, or `{hint}` for one that is a remedy.

    Other expressions, and f-strings without text of their own, give an empty string: their form is unknown.
    """
    if isinstance(message, ast.Constant):
        return str(message.value)
    if not isinstance(message, ast.JoinedStr):
        return ""
    parts = [
        str(part.value)
        if isinstance(part, ast.Constant)
        else "{hint}"
        if REMEDY_NAME.search(ast.unparse(part))
        else "{}"
        for part in message.values
    ]
    return "".join(parts) if re.search(r"\w", re.sub(r"{\w*}", "", "".join(parts))) else ""


def find_malformed_messages(path: Path) -> list[str]:
    """List messages of `HkdError` that do not have the form `<what>: <problem>. <remedy>.`

    `<what>: expected X, got Y.` has the form as well: what is expected is the remedy.
    """
    offenders = []
    for node in ast.walk(parse(path)):
        if not (isinstance(node, ast.Call) and node.args and ast.unparse(node.func) in ERROR_CLASSES):
            continue
        template = format_template(node.args[0])
        if template and not MESSAGE_FORM.fullmatch(template):
            offenders.append(f"{format_place(path, node.lineno)}: {template}")
    return offenders


def list_repository_files() -> list[Path]:
    """List the files under version control, without `.ci`."""
    command = ["git", "ls-files", "-z", "--", ".", ":!.ci"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        pytest.skip("not a git repository")
    return [ROOT / name for name in process.stdout.split("\0") if name]


def find_outside_references(path: Path) -> list[str]:
    """List references to directories outside the repository."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:  # a binary file
        return []
    pattern = re.compile("|".join(rf"(?<![\w.]){re.escape(text)}" for text in OUTSIDE_REFERENCES))
    return [
        f"{format_place(path, number)}: {match[0]}"
        for number, line in enumerate(lines, 1)
        if (match := pattern.search(line))
    ]


def count_lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def list_short_modules(paths: Iterable[Path]) -> list[str]:
    lengths = {path: count_lines(path) for path in paths}
    return [f"{format_place(path, lines)}" for path, lines in lengths.items() if lines < SHORT_MODULE_LINES]


def fail_with(offenders: Iterable[str], rule: str) -> None:
    """Fail with one line per offender, sorted by file and line number."""
    parts = sorted([int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)] for text in offenders)
    if parts:
        lines = ["".join(map(str, line)) for line in parts]
        pytest.fail("\n".join([f"{rule} ({len(lines)} offenders)", *lines]), pytrace=False)


MODULES = list_modules(PACKAGES)
COUNTED_MODULES = [path for path in MODULES if path.name != "__init__.py"]


def test_modules_have_no_forbidden_words() -> None:
    fail_with([word for path in MODULES for word in find_words_in_module(path)], "use the terms of the field")


def test_docs_have_no_forbidden_words() -> None:
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*")]
    texts = sorted(path for path in texts if path.is_file())
    assert len(texts) > 10
    fail_with([word for path in texts for word in find_words_in_text(path)], "use the terms of the field")


@pytest.mark.parametrize("find", [find_undocumented_arguments, find_undocumented_results])
def test_public_functions_have_google_sections(find: Callable[[Sequence[Path]], tuple[list[str], int]]) -> None:
    offenders, num_functions = find(MODULES)
    assert num_functions > 300
    if len(offenders) > (1 - MIN_DOCUMENTED_RATIO) * num_functions:
        fail_with(offenders, f"{MIN_DOCUMENTED_RATIO:.0%} of {num_functions} public functions need the section")


def test_family_checks_are_in_models_only() -> None:
    types = list_family_types(ROOT / "hkd_det" / "models")
    assert {"BaseDetector", "FasterRCNN", "OnnxTeacher", "DenseOutputs", "ProposalOutputs", "DetectionBatch"} <= types
    paths = [path for path in MODULES if not path.relative_to(ROOT).as_posix().startswith(FAMILY_MODULES)]
    fail_with([check for path in paths for check in find_family_checks(path, types)], "add a method to BaseDetector")


def test_public_names_are_unique() -> None:
    fail_with(find_duplicate_names(MODULES), "rename all but one, or merge them")


def test_error_messages_have_the_form() -> None:
    fail_with(
        [message for path in MODULES for message in find_malformed_messages(path)], "<what>: <problem>. <remedy>."
    )


def test_no_reference_leaves_the_repository() -> None:
    offenders = [reference for path in list_repository_files() for reference in find_outside_references(path)]
    fail_with(offenders, "tests take outside data from HKD_TEST_DATA")


def test_number_of_modules() -> None:
    assert len(COUNTED_MODULES) <= MAX_MODULES, "merge modules that have one user or share one idea"
    short = list_short_modules(COUNTED_MODULES)
    if len(short) > MAX_SHORT_MODULES:
        fail_with(short, f"at most {MAX_SHORT_MODULES} modules have fewer than {SHORT_MODULE_LINES} lines")


# Each check on a snippet that breaks the rule, and on one that does not.


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a snippet to a file."""

    def write_snippet(text: str, name: str = "snippet.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_snippet


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ('"""Title.\n\nA picture a line.\n"""\n', 3, "picture"),
        ("x = 1  # Nobody is here\n", 1, "Nobody"),
        ('def f(x):\n    raise ValueError(f"{x}: judged")\n', 2, "judged"),
        ('key = "picture_hw"\n', 1, "picture"),
    ],
)
def test_forbidden_word_in_module_is_found(write: Callable[..., Path], text: str, line: int, word: str) -> None:
    path = write(text)
    assert find_words_in_module(path) == [f"{path}:{line}: {word}"]


def test_words_that_contain_a_forbidden_word_are_allowed(write: Callable[..., Path]) -> None:
    assert find_words_in_module(write('"""A filmstrip in a pictureless lessoning. Retold."""\npicture = 1\n')) == []


def test_forbidden_word_in_text_is_found(write: Callable[..., Path]) -> None:
    path = write("# Title\n\nThe film.\n", "page.md")
    assert find_words_in_text(path) == [f"{path}:3: film"]


DOCUMENTED = '''
class Box:
    """A box.

    Args:
        x: Left, pixels.
    """

    def __init__(self, x: int) -> None:
        self.x = x

    def move(self, dx: int) -> "Box":
        """Move the box.

        Args:
            dx: Offset, pixels.

        Returns:
            The moved box.
        """
        return Box(self.x + dx)

    def copy(self) -> "Box":
        """Return a copy."""
        return Box(self.x)

    @property
    def left(self) -> int:
        """Left side, pixels."""
        return self.x

    def _private(self, y: int) -> int:
        return y
'''


def test_documented_functions_are_accepted(write: Callable[..., Path]) -> None:
    path = write(DOCUMENTED)
    assert find_undocumented_arguments([path]) == ([], 2)
    assert find_undocumented_results([path]) == ([], 2)


def test_missing_sections_are_found(write: Callable[..., Path]) -> None:
    path = write(DOCUMENTED.replace("Args:", "Arguments:").replace("Returns:", "Result:"))
    arguments, results = find_undocumented_arguments([path])[0], find_undocumented_results([path])[0]
    assert [text.partition(": ")[2] for text in arguments] == ["Box.__init__ has no Args:", "Box.move has no Args:"]
    assert [text.partition(": ")[2] for text in results] == ["Box.move has no Returns:"]


def test_overriding_method_needs_no_sections(write: Callable[..., Path]) -> None:
    base = write(DOCUMENTED, "base.py")
    override = write("class Square(Box):\n    def move(self, dx: int) -> Box:\n        return self\n", "square.py")
    assert find_undocumented_arguments([base, override]) == ([], 2)
    assert find_undocumented_results([base, override]) == ([], 2)
    assert find_undocumented_arguments([override]) == ([f"{override}:2: Square.move has no Args:"], 1)


def test_function_without_docstring_is_found(write: Callable[..., Path]) -> None:
    path = write("def f(x: int) -> int:\n    return x\n")
    assert find_undocumented_arguments([path]) == ([f"{path}:1: f has no Args:"], 1)
    assert find_undocumented_results([path]) == ([f"{path}:1: f has no Returns:"], 1)


def test_family_types_include_indirect_subclasses(write: Callable[..., Path]) -> None:
    path = write("class A(BaseDetector): ...\nclass B(A): ...\nclass C: ...\nclass RoIOutputs: ...\n", "models/a.py")
    assert list_family_types(path.parent) == {"BaseDetector", "A", "B", "RoIOutputs"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("isinstance(x, FasterRCNN)\n", 1),
        ("isinstance(x, (int, base.FasterRCNN))\n", 1),
        ("isinstance(x, int | FasterRCNN)\n", 1),
        ("match x:\n    case FasterRCNN():\n        pass\n", 2),
    ],
)
def test_family_check_is_found(write: Callable[..., Path], text: str, line: int) -> None:
    path = write(text)
    assert find_family_checks(path, {"FasterRCNN"}) == [f"{path}:{line}: FasterRCNN"]


def test_other_isinstance_is_allowed(write: Callable[..., Path]) -> None:
    assert find_family_checks(write("isinstance(x, int)\nmatch x:\n    case int():\n        pass\n"), {"A"}) == []


def test_duplicate_name_is_found(write: Callable[..., Path]) -> None:
    paths = [write("class Layer: ...\ndef main(): ...\ndef _f(): ...\n", name) for name in ("a.py", "b.py")]
    assert find_duplicate_names(paths) == [f"Layer: {paths[0]}:1, {paths[1]}:1"]


@pytest.mark.parametrize(
    "message",
    [
        '"file is broken. Export it again."',
        'f"{path}: broken."',
        'f"{path}: broken. Export it again"',
        'f"{path}: a, b"',
    ],
)
def test_malformed_message_is_found(write: Callable[..., Path], message: str) -> None:
    path = write(f"raise DataError({message})\n")
    assert len(find_malformed_messages(path)) == 1


@pytest.mark.parametrize(
    "message",
    ['"--x: broken. Omit it."', 'f"{path}: expected a, got {b}."', 'f"{path}: broken. {hint}"', 'f"{a}: {b}"', "text"],
)
def test_well_formed_message_is_accepted(write: Callable[..., Path], message: str) -> None:
    assert find_malformed_messages(write(f"raise DataError({message})\n")) == []


@pytest.mark.parametrize("reference", OUTSIDE_REFERENCES)
def test_outside_reference_is_found(write: Callable[..., Path], reference: str) -> None:
    path = write(f"first\npath: {reference}\n", "data.yaml")
    assert find_outside_references(path) == [f"{path}:2: {reference}"]


def test_short_module_is_found(write: Callable[..., Path]) -> None:
    short, long = write(39 * "\n", "short.py"), write(40 * "\n", "long.py")
    assert list_short_modules([short, long]) == [f"{short}:39"]
