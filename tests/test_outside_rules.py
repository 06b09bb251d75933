"""Two rules from outside the table: each is one short file and needs no edit of the package.

The laws of test_laws.py, test_shapes.py and test_transforms.py hold for them too: they are among `laws.RULES`.
"""

import ast
from pathlib import Path

import pytest
import torch
from laws import RULES, forms
from outside.delta_rnn import DELTA_RNN
from outside.pkda import PKDA

import fwp
from fwp.cli import main
from fwp.nn import FastWeightAttention
from fwp.testing import deviation, sample
from fwp_benchmarks import oracle

HERE = Path(__file__).parent
PACKAGE = Path(fwp.__file__).parent
FILES = {"PKDA": HERE / "outside" / "pkda.py", "DELTA_RNN": HERE / "outside" / "delta_rnn.py"}
OUTSIDE = pytest.mark.parametrize("rule", [PKDA, DELTA_RNN], ids=lambda rule: rule.name)


@OUTSIDE
def test_the_laws_run_over_it(rule):
    assert rule in RULES
    assert rule.name not in fwp.RULES
    assert len(forms(rule)) == (3 if rule.lower else 1)


@pytest.mark.parametrize("name", FILES)
def test_one_file_of_at_most_40_lines(name):
    source = FILES[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 40
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {module for module in imported if module.startswith("fwp")} <= {
        "fwp",
        "fwp.core",
        "fwp.rules.reference",
        "fwp.rules.spec",
    }


@OUTSIDE
def test_the_package_knows_nothing_of_it(rule):
    named = [path for path in PACKAGE.rglob("*.py") if rule.name in path.read_text(encoding="utf-8")]
    assert named == []


@pytest.mark.parametrize("writes", [1, 2])
def test_pkda_equals_the_oracle(writes):
    x = sample(PKDA, T=70, K=5, V=3, state=True, writes=writes)
    start, arrays = x["state"], {key: t.numpy() for key, t in x.items() if key != "state"}
    out, S, _ = oracle.fast_weights("pkda", **arrays, S=start.S.numpy())
    for form in forms(PKDA):
        found, end = fwp.fast_weights(PKDA, **x, **form)
        assert deviation(found, torch.from_numpy(out)) < 1e-12
        assert deviation(end.S, torch.from_numpy(S)) < 1e-12


@pytest.mark.parametrize("writes", [1, 2])
def test_delta_rnn_equals_the_oracle(writes):
    x = sample(DELTA_RNN, T=23, K=5, V=3, state=True, writes=writes)
    W, R, y = (t.numpy() for t in x["state"])
    arrays = {key: t.numpy() for key, t in x.items() if key != "state"}
    out, *state = (torch.from_numpy(t) for t in oracle.delta_rnn(**arrays, W=W, R=R, y=y))
    found, end = fwp.fast_weights(DELTA_RNN, **x)
    assert deviation(found, out) < 1e-12
    assert all(deviation(a, b) < 1e-12 for a, b in zip(end, state, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_fwp_check_takes_its_file(name, capsys):
    assert main(["check", "--rule", f"{FILES[name]}:{name}", "--backend", "reference"]) == 0
    assert ", 0 failed" in capsys.readouterr().out


@OUTSIDE
def test_the_layer_is_trained_with_it(rule):
    """The layer makes the rule's gates by projections that learn. Token by token it gives the same results."""
    torch.manual_seed(0)
    layer = FastWeightAttention(16, 2, rule, feature_norm="l2")
    x = torch.randn(4, 12, 16)
    target = x.roll(1, 1)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = (layer(x)[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        whole, state, outs = layer(x)[0], None, []
        for t in range(12):
            out, state = layer(x[:, t : t + 1], state)
            outs.append(out)
    assert deviation(torch.cat(outs, 1), whole) < 1e-5
