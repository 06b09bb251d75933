"""`fwp check` makes the comparisons that it lists, fails when something is wrong, and writes valid JSON."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from fwp import rules
from fwp.backends import chunked, reference
from fwp.cli import main
from fwp.rules import lowering
from fwp_benchmarks import equivalence, laws, oracle
from fwp_benchmarks.results import write_whole

KEYS = {"rule", "case", "backend", "form", "dtype", "device", "interpreted", "quantity", "error", "bound", "ok"}
OUTSIDE = Path(__file__).parent / "outside"
EVALUATE = equivalence.testing.evaluate.__kwdefaults__


@pytest.fixture
def one_case(monkeypatch):
    """Only one case, run in this process, since all cases would take long."""
    monkeypatch.setattr(equivalence, "CASES", equivalence.CASES[:1])
    monkeypatch.setattr(equivalence, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))


@pytest.mark.parametrize("rule", ["additive", "gated_delta"])
def test_a_green_run_exits_0_and_writes_json(rule, one_case, tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert equivalence.main(rule, "torch", file) == 0
    found = json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in the JSON"))
    assert all(set(row) - {"note"} == KEYS for row in found)
    assert {row["quantity"] for row in found} >= {"out", "state.S", "dq", "dk", "dv", "dstate.S"}
    assert {(row["form"], row["dtype"]) for row in found} >= {
        (form, dtype) for form in ("recurrent", "chunk") for dtype in ("float64", "float32", "bfloat16")
    }
    assert all(row["ok"] is (row["error"] <= row["bound"]) for row in found if row["ok"] is not None)
    assert rule in capsys.readouterr().out


def test_every_rule_meets_the_named_identities():
    for rule in rules.RULES.values():
        found = [row for identity in equivalence.IDENTITIES for row in identity(rule)]
        cases = {row["case"] for row in found}
        assert cases >= {"quadratic masked", "quadratic, writes", "orthonormal recall", "oracle"}
        normalised = not rule.erases or rule.normalised is not None
        assert ("quadratic, normalised" in cases) is normalised, rule.name
        stated = rule.name in oracle.RULES
        assert ("oracle, writes" in cases) is stated, rule.name
        assert ("oracle, normalised" in cases) is (stated and normalised), rule.name
        assert cases >= {f"extends {name}" for name in rule.extends}, rule.name
        assert [row for row in found if row["ok"] is False] == []


def test_recall_runs_for_what_extends_a_rule_that_recalls():
    """Every rule that has finite gates for it. longhorn has none: only an infinite rate would replace a value."""
    notes = {}
    for rule in (*rules.RULES.values(), _module(OUTSIDE / "pkda.py").PKDA):
        (*_, last) = equivalence.recall(rule)
        notes[rule.name] = last.get("note", "ran")
    assert notes["longhorn"] == "no finite gates make it 'delta' at full strength"
    assert set(notes.values()) == {"ran", notes["longhorn"]}
    assert {"delta", "gla", "gdn2", "comba", "rwkv7", "pkda"} <= {name for name, note in notes.items() if note == "ran"}


def fault_in_the_chunk(monkeypatch):
    right = chunked._chunk
    monkeypatch.setattr(chunked, "_chunk", lambda *args: [x * (1 + 1e-9) for x in right(*args)])


def fault_in_the_lowering(monkeypatch):
    def forgets_the_old_value(core, beta, g=None):
        return lowering.replace(core, g=g, w=beta, e=beta * 0)

    row = lowering.replace(rules.RULES["delta"], lower=forgets_the_old_value)
    monkeypatch.setitem(rules.RULES, "delta", row)


def fault_in_the_equation(monkeypatch):
    row = lowering.replace(
        rules.RULES["delta"], step=lambda S, k, v, beta: S + beta[..., None, None] * k[..., None] * v[..., None, :]
    )
    monkeypatch.setitem(rules.RULES, "delta", row)


def fault_in_the_gradient(monkeypatch):
    def lossy(*args):
        out, S = right(*args)
        return out.detach() + 0.999 * (out - out.detach()), S

    right = chunked._chunk
    monkeypatch.setattr(chunked, "_chunk", lossy)


def not_a_number(monkeypatch):
    right = chunked._tokens_of_one_read
    monkeypatch.setattr(chunked, "_tokens_of_one_read", lambda *args: (right(*args)[0] * math.nan, args[1]))


@pytest.mark.parametrize(
    "plant",
    [fault_in_the_chunk, fault_in_the_lowering, fault_in_the_equation, fault_in_the_gradient, not_a_number],
)
def test_a_planted_fault_exits_1(plant, one_case, monkeypatch, tmp_path, capsys):
    plant(monkeypatch)
    file = tmp_path / "rows.json"
    assert equivalence.main("delta", "torch", file) == 1
    failed = [row for row in json.loads(file.read_text()) if row["ok"] is False]
    assert failed
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize(("file", "lowered"), [("pkda.py", True), ("delta_rnn.py", False)])
def test_a_rule_from_a_file(file, lowered, one_case, tmp_path, capsys):
    path = OUTSIDE / file
    name = next(n for n, x in vars(_module(path)).items() if isinstance(x, rules.Rule))
    json_file = tmp_path / "rows.json"
    assert equivalence.main(f"{path}:{name}", None, json_file) == 0
    found = json.loads(json_file.read_text())
    ran = {(row["case"], row["backend"]) for row in found if row["ok"] is not None}
    assert ("split and carry", "reference") in ran
    assert (("equation", "torch") in ran) is lowered
    noted = {row["backend"] for row in found if row["ok"] is None}  # comparisons that can't run have a note
    missing = set() if find_spec("triton") else {"triton"}
    assert noted == (missing if lowered else {"torch", "native", "triton"})
    assert (("equation", "triton") in ran) is (lowered and not missing)


def _module(path):
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("dleta", "rule: expected one of .*did you mean 'delta'"),
        ("my.py", "rule: expected FILE.py:NAME with the name of a fwp.Rule in that file, got 'my.py'"),
        ("nowhere.py:RULE", "rule: expected a file, got 'nowhere.py'"),
        (
            f"{OUTSIDE / 'pkda.py'}:PKAD",
            rf"rule: expected one of the rules PKDA in {OUTSIDE / 'pkda.py'}, got 'PKAD'; did you mean 'PKDA'\?",
        ),
        ("empty.py:RULE", "rule: expected the name of a fwp.Rule, but there is none, in empty.py, got 'RULE'"),
        ("syntax.py:RULE", r"rule: expected a file that runs, got 'syntax.py', which raises SyntaxError: .*line 1"),
        ("raises.py:RULE", r"rule: expected a file that runs, got 'raises.py', which raises RuntimeError: two lines$"),
    ],
)
def test_an_unknown_rule_is_one_line(rule, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty.py").write_text("RULE = None\n")
    Path("syntax.py").write_text("def RULE(:\n")
    Path("raises.py").write_text("raise RuntimeError('two\\nlines')\n")
    with pytest.raises(ValueError, match=message):
        equivalence.find(rule)
    assert main(["check", "--rule", rule]) == 2
    assert re.fullmatch(rf"fwp: {message}.*\n", capsys.readouterr().err.replace("$", ""))


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_nothing_compared_is_no_success(backend, tmp_path, capsys):
    """The backend can serve no form of the rule. Its note is the only one, and the exit status is 1."""
    file = tmp_path / "rows.json"
    assert equivalence.main(f"{OUTSIDE / 'delta_rnn.py'}:DELTA_RNN", backend, file) == 1
    (row,) = json.loads(file.read_text())
    assert (row["backend"], row["ok"]) == (backend, None)
    assert "no lowered form" in row["note"]
    assert "0 comparisons, 0 failed, 1 not run" in capsys.readouterr().out


def test_kernels_run_in_other_processes(tmp_path, monkeypatch):
    """They run in the interpreter. Their rows come back, and so do their errors."""
    pytest.importorskip("triton")
    file = tmp_path / "rows.json"
    assert equivalence.main("additive", "triton", file) == 0
    found = json.loads(file.read_text())
    gpu = torch.cuda.is_available()
    assert {row["case"] for row in found} == {case.name for case in equivalence.CASES if gpu or case.interpreted}
    assert {row["form"] for row in found} == {"recurrent", "chunk"}
    assert all(row["ok"] and row["interpreted"] is (row["device"] == "cpu") for row in found)
    monkeypatch.setattr(equivalence, "kernel_rows", stops)
    with pytest.raises(RuntimeError, match="^additive stops$"):
        equivalence.main("additive", "triton")


def stops(name):
    raise RuntimeError(f"{name} stops")


def test_files_that_can_be_written_are_left_as_they_were(tmp_path, monkeypatch):
    """Testing whether --json can be written neither creates nor changes the file."""
    monkeypatch.setattr(equivalence, "main", lambda *_: 0)
    there = tmp_path / "there.json"
    there.write_text("old")
    for name in ("there.json", "new.json"):
        assert main(["check", "--json", str(tmp_path / name)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    assert there.read_text() == "old"


def test_correct_rules_of_ones_own_are_green(one_case, tmp_path):
    """Rules may lack parts and may have any name.

    plain has no lowered form. namesake has the name of a row of the table. half doesn't replace a value at β = 1. own
    has a state of its own and extends a rule that has none. The `lower` of looks uses k.
    """
    (tmp_path / "mine.py").write_text(
        "from fwp.rules import Rule, lowering, reference, spec\n"
        "plain = Rule('plain', step=reference.delta, gates={'beta': spec.beta()}, erases=True)\n"
        "namesake = Rule('delta', step=reference.additive, lower=lowering.additive)\n"
        "half = Rule('half', step=lambda S, k, v, beta: reference.delta(S, k, v, beta / 2),\n"
        "    gates={'beta': spec.beta()}, lower=lambda core, beta: lowering.delta(core, beta / 2), erases=True)\n"
        "own = Rule('own', step=lambda S, k, v: (reference.additive(S[0], k, v),),\n"
        "    init=lambda *a: (spec.init_zero(*a),), read=lambda S, q: (spec.read_linear(S[0], q)[0], S),\n"
        "    extends={'additive': lambda k, v: {}})\n"
        "looks = Rule('looks', step=lambda S, k, v, beta: reference.delta(S, k, v, beta / (1 + (k * k).sum(-1))),\n"
        "    gates={'beta': spec.beta()}, erases=True, any_keys=True,\n"
        "    lower=lambda core, beta: lowering.delta(core, beta / (1 + (core.k * core.k).sum(-1))))\n"
    )
    for name in ("plain", "namesake", "half", "own", "looks"):
        assert equivalence.main(f"{tmp_path / 'mine.py'}:{name}", "reference") == 0
        assert name in ("plain", "own") or equivalence.main(f"{tmp_path / 'mine.py'}:{name}", "torch") == 0


def test_a_rule_that_raises_is_a_comparison_that_failed(one_case, tmp_path, capsys):
    """The row has the error and its place instead of a traceback."""
    (tmp_path / "mine.py").write_text(
        "from fwp.rules import Rule, lowering, reference, spec\n"
        "def step(S, k, v):\n"
        "    raise RuntimeError('two\\nlines')\n"
        "steps = Rule('steps', step=step, lower=lowering.additive)\n"
        "lowers = Rule('lowers', step=reference.additive, lower=lambda core: core.nothing)\n"
        "extends = Rule('extends', step=reference.additive, lower=lowering.additive, extends={'dleta': step})\n"
        "gates = Rule('gates', step=reference.delta, gates={'rate': spec.beta()}, lower=lowering.delta)\n"
    )
    file = tmp_path / "rows.json"
    for name, message in {
        "steps": "RuntimeError: two lines (mine.py, line 3)",
        "lowers": "AttributeError: 'Core' object has no attribute 'nothing' (mine.py, line 5)",
        "extends": "ValueError: rule: expected one of",
        "gates": "TypeError: delta() got an unexpected keyword argument 'rate'",
    }.items():
        where = ["--backend", "torch", "--json", str(file)]
        assert main(["check", "--rule", f"{tmp_path / 'mine.py'}:{name}", *where]) == 1
        failed = [row for row in json.loads(file.read_text()) if row["ok"] is False]
        assert any(row["note"].startswith(message) for row in failed), [row["note"] for row in failed]
        assert message in _joined(capsys.readouterr().out)


def test_what_a_backend_refuses_leaves_the_other_cases(monkeypatch):
    """Refused cases get a note, all others their numbers."""

    def call(rule, *args, backend="auto", **options):
        if backend == "torch" and options.get("read") == "before":
            raise ValueError("backend: 'torch' can't serve this: the read")
        return right(rule, *args, backend=backend, **options)

    right = equivalence.testing.fast_weights
    monkeypatch.setattr(equivalence.testing.evaluate, "__kwdefaults__", {**EVALUATE, "call": call})
    found = list(equivalence.against_reference(rules.RULES["additive"], "torch", "cpu", False))
    refused = {row["case"] for row in found if row["ok"] is None}
    assert refused == {case.name for case in equivalence.CASES if case.options.get("read") == "before"}
    assert {row["case"] for row in found if row["ok"]} == {case.name for case in equivalence.CASES} - refused


def test_the_quadratic_form_by_hand():
    """Two tokens, one head, K = V = 1: o_1 = q_1 k_1 v_1, o_2 = q_2 (α k_1 v_1 + k_2 v_2)."""
    q, k, v = (torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in ([2.0, 3.0], [5.0, 7.0], [11.0, 13.0]))
    g = torch.tensor([0.0, math.log(0.5)], dtype=torch.float64).view(1, 2, 1)
    out = equivalence.quadratic(equivalence.Core(q, k, v, g=g))
    assert out.flatten().tolist() == pytest.approx([2 * 5 * 11, 3 * (0.5 * 5 * 11 + 7 * 13)])
    # the same two writes for one query, and erase keys 1 and 3: after the decay 3 finds .5 · 5 · 11, before it 5 · 11
    a = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 2, 1, 1)
    for before, found in ((False, 0.5 * 5 * 11), (True, 5 * 11)):
        core = equivalence.Core(q[:, 1:], k, v, g=g, a=a, writes=2, erase_before_decay=before)
        out = equivalence.quadratic(core)
        assert out.flatten().tolist() == pytest.approx([3 * (0.5 * 5 * 11 + 7 * (13 - 3 * found))])


WIDE, NARROW = r"case +on +64 +32 +16 +64 +32 +16 *\n", r"case +on +form +64 +32 +16 *\n"


@pytest.mark.parametrize(("columns", "header"), [(80, WIDE), (60, NARROW)])
@pytest.mark.parametrize("rule", ["gated_delta", f"{OUTSIDE / 'delta_rnn.py'}:DELTA_RNN"])
def test_the_table_fits_into_few_columns(rule, columns, header, one_case, tmp_path, monkeypatch, capsys):
    """No line is too long, and no word and no number is cut."""
    file = tmp_path / "rows.json"
    monkeypatch.setenv("COLUMNS", str(columns))
    assert equivalence.main(rule, None if "DELTA" in rule else "torch", file) == 0
    printed = capsys.readouterr().out
    assert re.search(header, printed)
    assert "…" not in printed and max(map(len, printed.splitlines())) <= columns
    found = [row for row in json.loads(file.read_text()) if row["ok"]]
    words = {word for row in found for word in row["case"].split()}
    assert words | {equivalence.cell([max(found, key=lambda row: row["error"])])} <= set(printed.split())


def test_what_failed_is_told_below_the_table(one_case, monkeypatch, capsys):
    fault_in_the_gradient(monkeypatch)
    monkeypatch.setenv("COLUMNS", "60")
    assert equivalence.main("delta", "torch") == 1
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 60
    assert re.search(r"equation, on torch: dk is off by \S+, more than 3e-04 \(chunk, float32\)", _joined(printed))


def _joined(text):
    return " ".join(text.split())


# ---- a rule without a lowered form ----

STEPS = {
    "right": "0.99 * S + k.unsqueeze(-1) * v.unsqueeze(-2)",
    "mixes sequences": "S + k.unsqueeze(-1) * v.unsqueeze(-2) + 1e-6 * S.mean(0)",
    "mixes heads": "S + k.unsqueeze(-1) * v.unsqueeze(-2) + 1e-6 * S.mean(1, keepdim=True)",
    "remembers calls": "S + k.unsqueeze(-1) * v.unsqueeze(-2) * next(count)",
    "knows its place": "S + (k * (1 + 1e-6 * torch.arange(len(k)))[:, None, None]).unsqueeze(-1) * v.unsqueeze(-2)",
    "loses a gradient": "S + (k + 1e-3 * (k.detach() - k)).unsqueeze(-1) * v.unsqueeze(-2)",
    "rounds": "(S + k.unsqueeze(-1) * v.unsqueeze(-2)).float().to(S)",
}
FOUND = {
    "right": set(),
    "mixes sequences": {"equation"},
    "mixes heads": {"equation", "packed"},
    "remembers calls": {"equation", "split and carry", "causality", "masked as removed", "permuted batch"},
    "knows its place": {"equation", "permuted batch"},
    "loses a gradient": {"gradients as differences"},
    "rounds": {"gradients as differences"},
}


def of_steps(tmp_path, step):
    (tmp_path / "mine.py").write_text(
        "import itertools, torch\nfrom fwp import Rule\ncount = itertools.count()\n"
        f"RULE = Rule('mine', step=lambda S, k, v: {step})\n"
    )
    return f"{tmp_path / 'mine.py'}:RULE"


@pytest.mark.parametrize("step", STEPS)
def test_a_rule_without_a_lowered_form_obeys_laws(step, tmp_path):
    """It may break no law, although nothing but the reference runs it."""
    file = tmp_path / "rows.json"
    assert equivalence.main(of_steps(tmp_path, STEPS[step]), None, file) == int(step != "right")
    found = json.loads(file.read_text())
    ran = {row["case"] for row in found if row["ok"] is not None}
    assert ran >= {"equation", "read before", "normalised", "grouped heads", "masked", "packed", "writes, packed"}
    assert ran >= {equivalence.in_words(law) for law in laws.LAWS} | {"split and carry"}
    failed = {row["case"] for row in found if row["ok"] is False}
    assert failed >= FOUND[step] if step != "right" else not failed
    assert {row["backend"] for row in found if row["ok"] is None} == {"torch", "native", "triton"}


def sees_later_tokens(right):
    def run(rule, core, gates, mask, state):
        k = core.k + 1e-6 * core.k.mean(1, keepdim=True)
        return right(rule, replace(core, k=k), gates, mask, state)

    return run


def ignores_the_mask(right):
    return lambda rule, core, gates, mask, state: right(rule, core, gates, None, state)


def carries_over_a_boundary(right):
    def run(rule, core, gates, mask, state):
        if core.cu_seqlens is None:
            return right(rule, core, gates, mask, state)
        whole = replace(core, cu_seqlens=core.cu_seqlens[[0, -1]])
        out, _ = right(rule, whole, gates, mask, type(state)(*(x if x is None else x[:1] for x in state)))
        return out, right(rule, core, gates, mask, state)[1]

    return run


@pytest.mark.parametrize(
    ("fault", "cases"),
    [
        (sees_later_tokens, {"causality", "equation", "split and carry"}),
        (ignores_the_mask, {"masked", "masked as removed"}),
        (carries_over_a_boundary, {"packed", "packed as separate"}),
    ],
)
def test_the_laws_find_faults_of_the_reference(fault, cases, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "run", fault(reference.run))
    file = tmp_path / "rows.json"
    assert equivalence.main(of_steps(tmp_path, STEPS["right"]), "reference", file) == 1
    assert {row["case"] for row in json.loads(file.read_text()) if row["ok"] is False} >= cases


def test_auto_takes_the_reference_where_nothing_is_lowered(one_case, monkeypatch, capsys):
    assert equivalence.main(f"{OUTSIDE / 'delta_rnn.py'}:DELTA_RNN", None) == 0
    assert "backend='auto' takes reference." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("command", "wrote", "said"),
    [
        ("check", False, "No rows were written; the same command starts anew."),
        ("check", True, "The rows are in .*rows.json; the same command starts anew and replaces them."),
        ("bench", False, "No rows were written; the same command starts anew."),
        ("bench", True, "The rows are in .*rows.json; the same command goes on from there."),
    ],
)
@pytest.mark.parametrize(("stop", "status"), [("Ctrl-C", 130), ("SIGTERM", 143)])
def test_a_stopped_command_says_what_is_kept(command, wrote, said, stop, status, tmp_path, monkeypatch, capsys):
    from fwp_benchmarks import speed

    def run(first, second, file):
        if wrote:
            file.write_text("{}")
        if stop == "Ctrl-C":
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(equivalence if command == "check" else speed, "main", run)
    assert main([command, "--json", str(tmp_path / "rows.json")]) == status
    assert re.fullmatch(f"Stopped. {said}\n", capsys.readouterr().err)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stopped_check_writes_what_it_compared(one_case, tmp_path, monkeypatch, capsys):
    """Also the rows of the rule that was under way."""
    right = equivalence.rule_rows

    def rows(name, backend):
        for n, row in enumerate(right(name, backend)):
            if name == "delta" and n == 3:
                signal.raise_signal(signal.SIGTERM)
            yield row

    monkeypatch.setattr(equivalence.rules, "RULES", {name: rules.RULES[name] for name in ("additive", "delta", "kda")})
    monkeypatch.setattr(equivalence, "rule_rows", rows)
    file = tmp_path / "rows.json"
    file.write_text("old")
    assert main(["check", "--backend", "torch", "--json", str(file)]) == 143
    found = [row["rule"] for row in json.loads(file.read_text())]
    assert found == ["additive"] * (len(found) - 3) + ["delta"] * 3 and len(found) > 10
    assert capsys.readouterr().err.startswith("Stopped. The rows are in ")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file, link = tmp_path / "rows.json", tmp_path / "link.json"
    file.write_text("old")
    link.symlink_to(file)
    write_whole(link, "new")
    assert file.read_text() == "new" and link.is_symlink()

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(file, "half")
    assert file.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "link.json"}
    monkeypatch.undo()
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit((tmp_path / "pipe").read_text)
        write_whole(tmp_path / "pipe", "through")
        assert read.result() == "through"


def test_the_version(capsys):
    import fwp

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fwp {fwp.__version__}\n"


def test_the_help_has_examples(capsys):
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        assert re.search("Examples: fwp list · fwp check .* · fwp reproduce ", _joined(capsys.readouterr().out))


def cut(printed, words, columns):
    """Whether a line is too long or one of the words is not printed whole."""
    return max(map(len, printed.splitlines())) > columns or not set(words) <= set(printed.split())


@pytest.mark.parametrize("columns", [60, 80])
def test_the_table_of_rules_fits_into_few_columns(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["list"]) == 0
    words = [
        word for row in rules.RULES.values() for cell in (*row.extends, row.name, row.paper) for word in cell.split()
    ]
    assert not cut(capsys.readouterr().out, words, columns)


@pytest.mark.parametrize("columns", [60, 80])
def test_the_table_of_verdicts_fits_into_few_columns(columns, monkeypatch, capsys):
    from fwp.cli import verdicts
    from fwp_benchmarks.report import in_words

    monkeypatch.setenv("COLUMNS", str(columns))
    path = Path(__file__).parents[1] / "benchmarks/results/reduced/claims.json"
    claims = json.loads(path.read_text())
    verdicts(path, [claim["id"] for claim in claims])
    cells = [in_words(claim[name]) for claim in claims for name in ("id", "published", "measured")]
    assert not cut(capsys.readouterr().out, [word for cell in cells for word in cell.split()], columns)
