"""Planted faults: for each the function that it changes, the right code, and the wrong code that replaces it.

A function is found by its name, and the code in it by its syntax tree, so both may move or be formatted anew. In the
right code `_` matches any expression. As the last positional argument of a call it matches all arguments that the
pattern doesn't name. In the wrong code `_` is what the first `_` matched, and `it` is the whole match.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

SOURCES = ("fwp", "kernels/fwp_kernels")


# The function's name, with as much of "fwp.module.Class." before it as makes it unique; an expression or statement in
# it; the wrong code that replaces it.
Fault = tuple[str, str, str]

CORE_FAULTS: dict[str, Fault] = {
    "an eraser that sees itself": ("Pairs", "j < at[:, None]", "j <= at[:, None]"),
    "a reader that sees itself before the update": (
        "Decays.of_piece",
        "Pairs(Gq, G, at, C, after, _)",
        "Pairs(Gq, G, at, C, True, _)",
    ),
    "a reader with the decay of its own token": ("Decays.of_piece", "G if after else earlier", "G"),
    "an eraser with the decay of its own token": (
        "Decays.of_piece",
        "earlier if options.erase_before_decay else G",
        "G",
    ),
    "a reader between the writes of its token": ("Decays.of_piece", "i[n - 1::n]", "i[::n]"),
    "a border of chunks without decay": ("_chunk", "d.whole * S", "S"),
    "writers that don't decay to the end": ("_chunk", "p.k * d.end", "p.k"),
    "erasing without the state before the chunk": ("_solve", "eraser * d.eraser", "0 * it"),
    "a gradient lost at the border of chunks": ("_forward", "step(piece, S, _)", "step(piece, S.detach(), _)"),
    "pairs of the wrong blocks": ("Pairs", "2 * half", "4 * half"),
    "a diagonal left out": ("Pairs.product", "(a * _).sum(-1, keepdim=True)", "0 * it"),
    "packed sequences in the wrong order": ("Layout.unsort", "self.unorder", "self.order"),
    "a column z that erases": ("_with_one", "torch.ones_like(x[..., :1])", "x[..., :1]"),
    "a token that erases after its decay": (
        "_tokens_of_one_read",
        "undecayed if options.erase_before_decay else S",
        "S",
    ),
    "a value that is retrieved without dividing": ("lowering.delta", "ratio(*retrieval(_, k, _))", "k"),
    "the keys up to a token, not before it": (
        "keys_before",
        "before = torch.cat(_, 1)[:, :-1]",
        "before = torch.cat(_, 1)[:, 1:]",
    ),
    "a decay forgotten in the lowering": ("lowering.delta", "replace(core, _, g=g)", "replace(core, _)"),
    "an erase key that is the key": ("lowering.comba", "p.to(_)", "to_heads(core.k, core.heads).to(_)"),
    "an erase strength for all channels": ("lowering.gdn2", "b * k", "k"),
    "the writes of a token in the wrong order": ("_interleaved", "[first, second]", "[second, first]"),
    "a mask that gates don't see": ("functional._prepared", "gate.masked_fill(_)", "gate"),
    "a mask that φ(0) passes": ("functional._prepared", "k.masked_fill(_, zero)", "k.masked_fill(_, 0)"),
    "keys that are scaled": ("applied", "transform(core.k, _)", "transform(core.k, _, scale=scale)"),
    "a decay after the write": ("reference.decay", "_ * S + outer(k, v)", "_ * (S + outer(k, v))"),
    "an equation that forgets to erase": ("reference.delta", "v - retrieve(S, k)", "v"),
    "an equation that erases along the wrong key": ("reference.comba", "retrieve(S, p)", "retrieve(S, k)"),
    "an equation that normalises what it writes": ("delta_normalised", "v - mean(S, z, k)", "v / 2 - mean(S, z, k)"),
    "a loop that reads too late": ("reference._walk", "core.read == 'before'", "False"),
    "a roll the wrong way": ("DPFP.__call__", "r.roll(i, -1)", "r.roll(-i, -1)"),
    "a written gradient that doesn't decay": ("_chunk_backward", "d.whole * d_S", "d_S"),
    "a written gradient without the state's own decay": ("_chunk_backward", "(S_end * d_S).sum(-1)", "0 * it"),
    "a written gradient of a later reader": ("_chunk_backward", "pad(earlier[..., 1:, :], _)", "earlier"),
    "a written gradient of a later eraser": (
        "_chunk_backward",
        "earlier if options.erase_before_decay else d_G",
        "d_G",
    ),
    "a written gradient without the erased keys": ("_chunk_backward", "d_k + d.A.grad_b(_)", "d_k"),
    "a written gradient without the erase key": ("_chunk_backward", "d_a = d_key", "d_a = 0 * d_key"),
    "a written gradient of the wrong sequences": ("_walk_backward", "reading.unsort(d_S)", "d_S"),
    "a written gradient of the state before": ("_walk_backward", "S_end[:n]", "S0[:n]"),
    "a written gradient summed the wrong way": ("_scan_backward", "pad(a, earlier)", "a"),
}

KERNEL_FAULTS: dict[str, Fault] = {
    "gates that count below the floor": ("sums_kernel", "tl.where(x < FLOOR, _)", "x"),
    "gates that aren't summed": ("sums_kernel", "tl.cumsum(x, _)", "x"),
    "erasing without its strength": ("pairs_kernel", "A *= _", "pass"),
    "a reader that decays too much": (
        "from_start",
        "load_sums(gates, _, BEFORE_DECAY, s)",
        "load_sums(gates, _, False, s)",
    ),
    "an inverse that isn't transposed": ("walk_back_kernel", "tl.trans(load(p_A_inv, _))", "load(p_A_inv, _)"),
    "a gradient that doesn't decay": ("walk_back_kernel", "decay_over_chunk(b_dS, _)", "b_dS"),
    "a gradient of the wrong head": ("walk_back_kernel", "h // s.HEADS_PER_V", "h * 0"),
    "a gate's gradient without the state's": ("gradients_kernel", "b_SdS += tl.sum(_)[None, :]", "pass"),
    "a gate's gradient of a later reader": ("gradients_kernel", "per_gate(_) + dG_reader", "0 * it"),
    "an eraser's gradient that misses its keys": ("gradients_kernel", "d_writer + b_e * b_dea", "d_writer"),
    "gates from beyond the end": ("load_sums", "tl.minimum(_, gates.end - 1)", "tl.minimum(_, gates.end)"),
    "pairs of the wrong blocks": ("half_block_decays", "_ + half - 1", "_ + half"),
    "a diagonal left out of a gradient": ("product_gradients", "db += own * a", "pass"),
    "the chunks of the first sequence": ("kept_at", "tl.load(slots + n)", "0 * it"),
    "a state that isn't brought on to its chunk": ("recompute_S", "at.c % EVERY", "at.c % 1"),
    "a gradient of S that isn't brought back": ("recompute_dS", "last - at.c", "-1 - at.c"),
    "a gradient of S of a chunk too far": ("recompute_dS", "tl.minimum(_) - 1", "tl.minimum(_)"),
    "a state in the place of another's": ("kept_at", "before + (n + 1) * _", "before"),
    "a segment that starts a chunk too early": ("segment_of", "segment % NS * CS", "it - segment % NS"),
    "a border of segments without decay": ("join_kernel", "b_S * tl.trans(decay)", "b_S"),
    "the decay of a segment's last chunk": ("walk_kernel", "g += _", "g = _"),
    "a matrix that isn't transposed backward": (
        "join_kernel",
        "j[None, :] * K + k_offsets[:, None]",
        "k_offsets[:, None] * K + j[None, :]",
    ),
    "a z that a segment's gates don't reach": ("join_kernel", "b_z *= decay", "pass"),
    "a segment that passes nothing on": (
        "walk_kernel",
        "b_S += (k_offsets[:, None] == v_offsets[None, :]).to(_)",
        "pass",
    ),
    "segments that begin with their sequence": ("packing.layout", "borders[owner] + inner * size", "borders[owner]"),
    "gradients that stay in their segment": (
        "launch.backward",
        "kernels.walk_back(prepared, upstream, States(), _)",
        "(it, segments.N.S.zero_())",
    ),
    "halves of an inverse that don't meet": ("inverse", "-dot(_)", "0 * dot(_)"),
    "chunks of the wrong sequence": (
        "packing._starts",
        "torch.searchsorted(ends, at, right=True)",
        "torch.searchsorted(ends, at)",
    ),
    "a key head's gradient of one head alone": ("_input_gradients.summed", "_.sum(3)", "_[:, :, :, 0]"),
    "a denominator that forgets the chunks before": ("walk_kernel", "read_vector(_)", "0 * it"),
    "a denominator of the wrong tokens": ("walk_kernel", "tl.sum(b_P.to(s.ACC), 1)", "tl.sum(b_P.to(s.ACC), 0)"),
    "a sum of keys that doesn't decay": ("walk_kernel", "b_z *= _", "pass"),
    "a gradient without the denominator's": ("gradients_kernel", "dP += b_dden", "pass"),
    "a gradient without the denominator's past": ("gradients_kernel", "b_dq += b_dden * b_z", "pass"),
    "a gradient of z that doesn't decay": ("walk_back_kernel", "b_dz *= _", "pass"),
    "a gradient of z without its readers": ("walk_back_kernel", "b_dz += _", "pass"),
    "a gradient of gates without z": ("gradients_kernel", "b_SdS += b_z * b_dz", "pass"),
    "features of half of [x, −x]": ("rectified", "-b", "b"),
    "features rolled the wrong way": ("mapped", "_ - f // (2 * D)", "_ + f // (2 * D)"),
    "a norm of the features that are there": ("norms_kernel", "total += _", "total = _"),
    "a gradient without the norm's": ("before_norm", "d_y - along", "d_y"),
    "a gradient without the length's": ("before_norm", "d_y - factor * b * along", "d_y"),
    "a gradient of features of one block": ("features_back_kernel", "along += _", "along = _"),
    "a gradient of half of the pairs": ("features_back_kernel", "rectified(p_x, rows, h, j + i, _)", "0 * it"),
    "a gradient of negative x": ("features_back_kernel", "1 - 2 * half", "1"),
    "a gradient of the first that shares a head": ("features.summed", "h * SHARE + i", "h * SHARE"),
    "a slope of 1 everywhere": ("slope", "tl.where(b > 0, 1.0, tl.exp(b))", "tl.where(b > 0, 1.0, 1.0)"),
    "keys that are scaled": ("features.keys", "s.K_PHI", "s.Q_PHI"),
    "a gradient of unscaled queries": ("gradients_kernel", "slope(p.q, _) * s.Q_PHI.SCALE", "slope(p.q, _)"),
    "a token's sum of keys that doesn't decay": ("token_kernel", "b_z *= decay", "pass"),
    "a token that doesn't erase": ("token_kernel", "b_x -= _", "pass"),
    "a token that erases after its decay": ("token_kernel", "if s.ERASE_BEFORE_DECAY:\n b_x -= _", "pass"),
    "an erase key that is the key": ("erase_keys", "load(p.a, _)", "b_k"),
    "an erase key without strength": ("per_token", "x is not None", "False"),
    "a reader of the wrong write": (
        "reading_rows",
        "0 if s.READ_BEFORE else s.WRITES - 1",
        "s.WRITES - 1 if s.READ_BEFORE else 0",
    ),
    "a gradient of an erase key without its strength": ("gradients_kernel", "b_e * b_dea", "b_dea"),
    "a gate's gradient of a later eraser": ("gradients_kernel", "from_S + dG_eraser", "0 * it"),
}


def find(root: Path, fault: Fault) -> tuple[str, Path]:
    """Full name and file of the fault's function. LookupError: not exactly one function of that name holds the code."""
    function, right, _ = fault
    found = _places(root, function, _parsed(right))
    if len(found) != 1:
        names = [name for name, _ in found or _places(root, "", _parsed(right))]
        innermost = [name for name in names if not any(other.startswith(f"{name}.") for other in names)]
        raise LookupError(
            f"{right!r}: expected in one function {function}, found in {len(found)}; it is in {innermost or 'none'}"
        )
    return found[0]


def plant(root: Path, fault: Fault) -> tuple[Path, str]:
    """The file of the fault and its text with the fault. LookupError as in `find`."""
    name, path = find(root, fault)
    _, right, wrong = fault
    tree = ast.parse(path.read_text(encoding="utf-8"))
    place = next(node for other, node in _functions(tree, _module(root, path)) if other == name)
    _Planter(_parsed(right), _parsed(wrong)).visit(place)
    return path, ast.unparse(ast.fix_missing_locations(tree))


def _parsed(code: str) -> ast.AST:
    """The syntax tree of an expression or statement."""
    (statement,) = ast.parse(code).body
    return statement.value if isinstance(statement, ast.Expr) else statement


def _places(root: Path, function: str, pattern: ast.AST) -> list[tuple[str, Path]]:
    """Full name and file of the functions and classes of that name that hold the pattern; "" is any name."""
    return [
        (name, path)
        for name, path, node in _all_functions(root)
        if (not function or f".{name}".endswith(f".{function}"))
        and any(_match(pattern, inner) is not None for inner in ast.walk(node))
    ]


@cache
def _all_functions(root: Path) -> list[tuple[str, Path, ast.AST]]:
    paths = [path for folder in SOURCES for path in sorted((root / folder).rglob("*.py"))]
    trees = [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]
    return [(name, path, node) for path, tree in trees for name, node in _functions(tree, _module(root, path))]


def _module(root: Path, path: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def _functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.iter_child_nodes(tree):
        name = prefix
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name = f"{prefix}.{node.name}"
            yield name, node
        yield from _functions(node, name)


def _is_blank(node: object) -> bool:
    return isinstance(node, ast.Name) and node.id == "_"


def _is_open(call: ast.Call) -> bool:
    """Whether its last positional argument is blank."""
    return bool(call.args) and _is_blank(call.args[-1])


def _match(pattern: object, node: object) -> list[object] | None:
    """What the pattern's blanks match in this node, (arguments, keywords) for a call's last one; None: no match."""
    if _is_blank(pattern):
        return [node] if isinstance(node, ast.expr) else None
    if isinstance(pattern, list) and isinstance(node, list):
        if len(pattern) != len(node):
            return None
        found = [_match(*pair) for pair in zip(pattern, node)]
    elif isinstance(pattern, ast.AST):
        if type(pattern) is not type(node):
            return None
        rest: list[object] = []
        if isinstance(node, ast.Call) and isinstance(pattern, ast.Call) and _is_open(pattern):
            known, words = len(pattern.args) - 1, {word.arg for word in pattern.keywords}
            rest = [(node.args[known:], [word for word in node.keywords if word.arg not in words])]
            pattern = ast.Call(pattern.func, pattern.args[:-1], pattern.keywords)
            node = ast.Call(node.func, node.args[:known], [word for word in node.keywords if word.arg in words])
        fields = [name for name in pattern._fields if name not in ("ctx", "kind", "type_comment")]
        found = [_match(getattr(pattern, name, None), getattr(node, name, None)) for name in fields] + [rest]
    else:
        return [] if pattern == node else None
    return None if any(blanks is None for blanks in found) else [blank for blanks in found for blank in blanks or ()]


class _Planter(ast.NodeTransformer):
    """Replaces every match of the pattern by `wrong`."""

    def __init__(self, pattern: ast.AST, wrong: ast.AST) -> None:
        self.pattern, self.wrong = pattern, wrong

    def visit(self, node: ast.AST) -> ast.AST:
        blanks = _match(self.pattern, node)
        return self.generic_visit(node) if blanks is None else _Filler(blanks, node).visit(deepcopy(self.wrong))


class _Filler(ast.NodeTransformer):
    """Replaces `_` and `it` by what was matched."""

    def __init__(self, blanks: list[object], it: ast.AST) -> None:
        self.blank, self.it = blanks[0] if blanks else None, it

    def visit_Name(self, node: ast.Name) -> object:
        if node.id == "it":
            return self.it
        return self.blank if node.id == "_" else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(self.blank, tuple) and _is_open(node):
            arguments, keywords = self.blank
            node.args[-1:] = arguments
            node.keywords = [*keywords, *node.keywords]
        return self.generic_visit(node)
