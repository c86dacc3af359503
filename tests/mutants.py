"""Small faults for a source file: where each would be and what would stand there."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

COMPARISONS = {
    **{ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<")},
    **{ast.Eq: ("!=",), ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",)},
    **{ast.In: ("not in",), ast.NotIn: ("in",)},
}
OPERATORS = {
    **{ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "//", ast.Pow: "*"},
    **{ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&"},
}
SELECTS = ("where", "_select")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A fault: the text between two places of a file, lines from 1 and columns in bytes, and what replaces it."""

    file: str
    kind: str
    line: int
    column: int
    end_line: int
    end_column: int
    after: str

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.column}:{self.end_line}:{self.end_column}:{self.after}"

    def apply(self, source: str) -> str:
        lines = source.encode().splitlines(keepends=True)
        first, last = lines[self.line - 1], lines[self.end_line - 1]
        changed = first[: self.column] + self.after.encode() + last[self.end_column :]
        return b"".join([*lines[: self.line - 1], changed, *lines[self.end_line :]]).decode()

    def diff(self, source: str) -> str:
        lines = difflib.unified_diff(source.splitlines(), self.apply(source).splitlines(), lineterm="", n=0)
        return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def draw(root: Path, count: int, seed: int) -> list[Mutant]:
    """Distinct mutants, spread over the package's files in proportion to their lines, in a random order."""
    random = np.random.default_rng(seed)
    sources = {str(path.relative_to(root)): path.read_text() for path in sorted((root / "asl_pallas").rglob("*.py"))}
    among = {file: _by_line(file, source) for file, source in sources.items()}
    among = {file: by_line for file, by_line in among.items() if by_line}
    share = np.array([len(sources[file].splitlines()) for file in among], np.float64)
    wanted = np.floor(np.cumsum(share / share.sum()) * count + 1e-9).astype(int)
    found: list[Mutant] = []
    for (_, by_line), n in zip(among.items(), np.diff(wanted, prepend=0), strict=True):
        # A line after the other, so that one with many operators has no more than its share.
        rounds: list[Mutant] = []
        left = {line: [mutants[i] for i in random.permutation(len(mutants))] for line, mutants in by_line.items()}
        while len(rounds) < n and left:
            for line in random.permutation(list(left)):
                rounds.append(left[line].pop())
            left = {line: mutants for line, mutants in left.items() if mutants}
        found += rounds[:n]
    return [found[i] for i in random.permutation(len(found))]


def _by_line(file: str, source: str) -> dict[int, list[Mutant]]:
    by_line: dict[int, list[Mutant]] = {}
    for mutant in of_source(file, source):
        by_line.setdefault(mutant.line, []).append(mutant)
    return by_line


def of_source(file: str, source: str) -> list[Mutant]:
    """All of a file's that are valid Python and another program."""
    lines = [line.decode() for line in source.encode().splitlines()]
    found = []
    for mutant in dict.fromkeys(_Finder(file, source, lines).found()):
        try:
            ast.parse(mutant.apply(source))
        except SyntaxError:
            continue
        found.append(mutant)
    return found


class _Finder:
    def __init__(self, file: str, source: str, lines: list[str]):
        self._file, self._source, self._lines = file, source, lines

    def found(self) -> Iterator[Mutant]:
        yield from self._in_body(ast.parse(self._source).body, inside=False)

    def _at(self, kind: str, node: ast.expr | ast.stmt, after: str) -> Mutant:
        assert node.end_lineno is not None and node.end_col_offset is not None
        place = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
        return Mutant(self._file, kind, *place, after)

    def _between(self, kind: str, left: ast.expr, right: ast.expr, after: str) -> Mutant | None:
        """In place of the operator between two expressions, where there is no bracket or comment beside it."""
        if left.end_lineno != right.lineno or left.end_col_offset is None:
            return None
        between = self._lines[right.lineno - 1].encode()[left.end_col_offset : right.col_offset].decode()
        if any(c in between for c in "()[]#"):
            return None
        return Mutant(
            self._file, kind, left.end_lineno, left.end_col_offset, right.lineno, right.col_offset, f" {after} "
        )

    def _text(self, node: ast.expr) -> str:
        return ast.get_source_segment(self._source, node) or ""

    def _in_body(self, body: list[ast.stmt], inside: bool) -> Iterator[Mutant]:
        for statement in body:
            yield from self._statement(statement, inside)

    def _statement(self, node: ast.stmt, inside: bool) -> Iterator[Mutant]:
        if isinstance(node, (ast.Import, ast.ImportFrom)) or (isinstance(node, ast.Expr) and _is_text(node.value)):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if node.name == "__repr__":
                return
            if isinstance(node, ast.FunctionDef):
                for default in (*node.args.defaults, *node.args.kw_defaults):
                    yield from self._expression(default)
            yield from self._in_body(node.body, inside=isinstance(node, ast.FunctionDef) or inside)
            return
        if isinstance(node, ast.Raise):  # its message is none of ours
            yield self._at("left out", node, "pass")
            return
        left_out = isinstance(node, (ast.Expr, ast.AugAssign, ast.Continue, ast.Break))
        if inside and (left_out or (isinstance(node, ast.Assign) and self._assigned_before(node))):
            yield self._at("left out", node, "pass")
        if isinstance(node, (ast.If, ast.While)):
            yield self._at("negated", node.test, f"not ({self._text(node.test)})")
        if isinstance(node, ast.AnnAssign):
            yield from self._expression(node.value)
            return
        for field, value in ast.iter_fields(node):
            if field in ("body", "orelse", "finalbody") and isinstance(value, list):
                yield from self._in_body(value, inside)
            elif isinstance(value, list):
                for one in value:
                    if isinstance(one, ast.expr):
                        yield from self._expression(one, inside)
                    elif isinstance(one, ast.withitem):
                        yield from self._expression(one.context_expr, inside)
                    elif isinstance(one, ast.ExceptHandler):
                        yield from self._in_body(one.body, inside)
            elif isinstance(value, ast.expr):
                yield from self._expression(value, inside)

    def _assigned_before(self, node: ast.Assign) -> bool:
        """A plain name that its own line reads: without the line, an earlier value stands."""
        if len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
            return False
        return any(isinstance(n, ast.Name) and n.id == node.targets[0].id for n in ast.walk(node.value))

    def _expression(self, node: ast.expr | None, inside: bool = True) -> Iterator[Mutant]:
        if node is None or isinstance(node, ast.JoinedStr):
            return
        yield from self._own(node, inside)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from self._expression(child, inside)
            elif isinstance(child, ast.keyword):
                yield from self._expression(child.value, inside)
            elif isinstance(child, ast.comprehension):
                yield from self._expression(child.iter, inside)
                for test in child.ifs:
                    yield self._at("negated", test, f"not ({self._text(test)})")
                    yield from self._expression(test, inside)

    def _own(self, node: ast.expr, inside: bool) -> Iterator[Mutant]:
        if isinstance(node, ast.Constant):
            yield from self._constant(node)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            for after in COMPARISONS[type(node.ops[0])]:
                yield from _some(self._between("comparison", node.left, node.comparators[0], after))
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            if inside or not isinstance(node.op, ast.BitOr):  # a union of types
                yield from _some(self._between("operator", node.left, node.right, OPERATORS[type(node.op)]))
        elif isinstance(node, ast.BoolOp):
            after = "or" if isinstance(node.op, ast.And) else "and"
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from _some(self._between("and/or", left, right, after))
        elif isinstance(node, ast.IfExp):
            body, test, other = map(self._text, (node.body, node.test, node.orelse))
            yield self._at("branches swapped", node, f"{other} if {test} else {body}")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
            yield self._at("sign", node, self._text(node.operand))
        elif isinstance(node, ast.Call) and len(node.args) >= 3:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in SELECTS and not any(isinstance(argument, ast.Starred) for argument in node.args):
                yes, no = node.args[1:3]
                swapped = Mutant(
                    *(self._file, "branches swapped", yes.lineno, yes.col_offset),
                    *(no.end_lineno or 0, no.end_col_offset or 0),
                    f"{self._text(no)}, {self._text(yes)}",
                )
                yield swapped

    def _constant(self, node: ast.Constant) -> Iterator[Mutant]:
        if isinstance(node.value, bool):
            yield self._at("constant", node, repr(not node.value))
        elif isinstance(node.value, int):
            yield self._at("constant", node, repr(node.value + 1))
            if node.value > 1:
                yield self._at("constant", node, repr(node.value * 2))
        elif isinstance(node.value, float):
            yield self._at("constant", node, repr(node.value * 1.5 if node.value else 1.0))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (str, type(...)))


def _some(mutant: Mutant | None) -> Iterator[Mutant]:
    if mutant is not None:
        yield mutant
