"""Models by a word have the shapes and layers that they say, and refuse what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rowgrad.errors import InputError
from rowgrad.training.architectures import Autoencoder, Form, build

TABLE, IMAGES, SEQUENCES = Form((6,), 3), Form((2, 9, 7), 3), Form((5, 4), 3)


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.children()]


@pytest.mark.parametrize("norm", ["batch-pre", "batch-post", "layer", "none"])
@pytest.mark.parametrize(
    ("spec", "form"),
    [
        ("mlp:8,5", TABLE),
        ("mlp:8", IMAGES),
        ("mlp:4", SEQUENCES),
        ("cnn:4,6,8,8", IMAGES),
    ],
)
def test_outputs_have_the_shape_asked_for(spec: str, form: Form, norm: str) -> None:
    model = build(spec, Form(form.shape, 3, norm=norm, dropout=0.2))
    x = torch.randn(4, *form.shape)
    assert model(x).shape == (4, 3)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("spec", "form"), [("mlp", TABLE), ("cnn", IMAGES)])
def test_without_widths_a_model_is_one_linear_layer(spec: str, form: Form) -> None:
    model = build(spec, form)
    assert [type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))] == ["Linear"]
    assert model(torch.randn(4, *form.shape)).shape == (4, 3)


def test_layers_are_those_of_the_word() -> None:
    assert kinds(build("mlp:8,5", TABLE)) == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    made = build("mlp:8", Form((6,), 3, "leaky_relu", 0.2, "batch-pre", 0.5))
    assert kinds(made) == ["Linear", "BatchNorm", "LeakyReLU", "Dropout", "Linear"]
    assert made[2].negative_slope == 0.2  # pyright: ignore[reportIndexIssue]
    assert kinds(build("mlp:8", Form((6,), 3, "maxout"))) == ["Maxout", "Linear"]
    convolution = ["Conv2d", "GroupNorm", "Tanh", "MaxPool2d"]
    assert kinds(build("cnn:4,5", Form((1, 8, 8), 3, "tanh", norm="layer"))) == [*convolution * 2, "Flatten", "Linear"]
    small = build("cnn:4,4,4", Form((1, 4, 4), 3))  # pooled twice, down to one pixel
    assert kinds(small).count("MaxPool2d") == 2


def test_an_autoencoder_answers_with_its_input() -> None:
    model = build("autoencoder:5,2", Form((6,), 3))
    assert isinstance(model, Autoencoder)
    assert model.encoder(torch.randn(4, 6)).shape == (4, 2)
    assert [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)] == [
        (6, 5),
        (5, 2),
        (2, 5),
        (5, 6),
    ]
    assert build("autoencoder:5", IMAGES)(torch.randn(4, 2, 9, 7)).shape == (4, 2 * 9 * 7)


def test_an_lstm_reads_each_sequence_to_its_end() -> None:
    torch.manual_seed(0)
    model = build("lstm:8,6", SEQUENCES).eval()
    x, lengths = torch.randn(3, 5, 4), torch.tensor([5, 2, 1])
    found = model(x, lengths)
    for k, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[k], model(x[k : k + 1, :n])[0])
    assert not torch.allclose(found[1], model(x)[1])


@pytest.mark.parametrize(
    ("spec", "form", "said"),
    [
        ("mpl:8", TABLE, "'mpl' is no kind of model; there are mlp, cnn, lstm, autoencoder"),
        ("mlp", Form((6,), 3, norm="layer"), "--norm layer: --model mlp has no hidden layer"),
        ("cnn", Form((1, 8, 8), 3, "tanh"), "--act tanh: --model cnn has no hidden layer"),
        ("mlp:8,x", TABLE, "expected widths of 1 or more"),
        ("mlp:0", TABLE, "expected widths of 1 or more"),
        ("cnn:8", TABLE, r"needs images, the examples have shape \(6,\)"),
        ("cnn:8", Form((1, 8, 8), 3, "maxout"), "--act maxout"),
        ("lstm:8", TABLE, "needs sequences"),
        ("lstm", SEQUENCES, "such as lstm:64"),
        ("lstm:8", Form((5, 4), 3, norm="layer"), "leave out --act and --norm"),
        ("autoencoder", TABLE, "such as autoencoder:32,8"),
        ("autoencoder:4", SEQUENCES, "autoencoder is for tables and images, the examples are sequences"),
        ("mlp:8", Form((6,), 3, "rely"), "activation 'rely'"),
        ("mlp:8", Form((6,), 3, norm="group"), "norm 'group'"),
        ("mlp:8", Form((6,), 3, dropout=1.0), "--dropout 1"),
    ],
)
def test_what_does_not_fit_is_refused(spec: str, form: Form, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build(spec, form)
