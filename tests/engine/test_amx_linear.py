"""Products in AMX tiles, beside the same ones in float64."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from mp_rerank._engine.amx.library import find_library, why_not  # noqa: E402
from mp_rerank._engine.amx.linear import TiledProduct  # noqa: E402

pytestmark = [pytest.mark.real, pytest.mark.skipif(find_library() is None, reason=why_not() or "-")]

F = torch.nn.functional
ACTIVATIONS = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
#: rows, depth, columns: one, fewer and more than a tile, a block, a chunk of rows or of depth has
SHAPES = [(1, 384, 384), (33, 100, 70), (70, 31, 33), (600, 384, 96), (257, 2100, 64), (64, 4096, 1), (31, 1, 200)]


def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(dtype)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 4e-6), (torch.bfloat16, 8e-3)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_products_are_those_of_float64(rows: int, depth: int, columns: int, dtype: torch.dtype, limit: float) -> None:
    input = numbers(rows, depth, dtype=dtype)
    weight = numbers(columns, depth, dtype=torch.float64).div(depth**0.5).to(dtype)
    other = numbers(rows, columns, dtype=dtype)
    for bias in (None, numbers(columns, dtype=dtype)):
        exact = F.linear(input.double(), weight.double(), None if bias is None else bias.double())
        for name, activation in ACTIVATIONS.items():
            found = TiledProduct(weight, bias, name)(input)
            torch.testing.assert_close(found.double(), activation(exact), rtol=limit, atol=limit)
        product = TiledProduct(weight, bias, "")
        for operation, wanted in (("add", exact + other.double()), ("mul", exact * other.double())):
            torch.testing.assert_close(product(input, other, operation).double(), wanted, rtol=limit, atol=4 * limit)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 4e-6), (torch.bfloat16, 8e-3)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 256, 384), (300, 100, 16), (70, 1500, 48)])
def test_a_gate_is_computed_with_what_it_opens(
    rows: int, depth: int, columns: int, dtype: torch.dtype, limit: float
) -> None:
    input = numbers(rows, depth, dtype=dtype)
    first, gate = (
        numbers(columns, depth + more, dtype=torch.float64)[:, :depth].div(depth**0.5).to(dtype) for more in (0, 1)
    )
    for biases in ((None, None), (numbers(columns, dtype=dtype), numbers(columns + 1, dtype=dtype)[1:])):
        one, two = (
            F.linear(input.double(), weight.double(), None if bias is None else bias.double())
            for weight, bias in zip((first, gate), biases, strict=True)
        )
        for name in ("gelu", "gelu_tanh", "silu"):
            found = TiledProduct(first, biases[0], name, (gate, biases[1]))(input)
            torch.testing.assert_close(found.double(), ACTIVATIONS[name](one) * two, rtol=limit, atol=4 * limit)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("rows", "depth", "inner", "columns"), [(1, 96, 64, 33), (33, 70, 96, 20), (600, 384, 160, 96), (300, 64, 2080, 40)]
)
def test_two_layers_some_rows_at_a_time_give_what_they_give_apart(
    rows: int, depth: int, inner: int, columns: int, gated: bool, dtype: torch.dtype
) -> None:
    input, other = numbers(rows, depth, dtype=dtype), numbers(rows, columns, dtype=dtype)
    first, gate = (numbers(inner, depth + more, dtype=dtype)[:, :depth] / 8 for more in (0, 1))
    up = TiledProduct(first, None if gated else numbers(inner, dtype=dtype), "gelu", (gate, None) if gated else None)
    down = TiledProduct(numbers(columns, inner, dtype=dtype) / 8, numbers(columns, dtype=dtype), "")
    assert up.can_feed(down)
    assert torch.equal(up.feed(down, input), down(up(input)))
    assert torch.equal(up.feed(down, input, other), down(up(input), other, "add"))


def test_which_layers_can_feed_others() -> None:
    def layer(columns: int, depth: int, activation: str = "", dtype: torch.dtype = torch.float32) -> TiledProduct:
        return TiledProduct(numbers(columns, depth, dtype=dtype), None, activation)

    up = layer(64, 32, "gelu")
    assert up.can_feed(layer(32, 64))
    assert not up.can_feed(layer(32, 96)), "it takes other numbers than there are"
    assert not up.can_feed(layer(32, 64, "silu")), "it does something else with its products"
    assert not up.can_feed(layer(32, 64, dtype=torch.bfloat16))
    assert not layer(48, 32, "gelu").can_feed(layer(32, 48)), "its numbers do not fill tiles"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "depth"), [(1, 64), (33, 100), (600, 384), (70, 2100)])
def test_layers_side_by_side_give_what_they_give_apart(rows: int, depth: int, dtype: torch.dtype) -> None:
    input = numbers(rows, depth, dtype=dtype)
    layers = [
        TiledProduct(numbers(columns, depth, dtype=dtype), numbers(columns, dtype=dtype) if columns > 32 else None, "")
        for columns in (64, 32, 50, 1)
    ]
    found = layers[0].side_by_side(layers[1:], input)
    assert all(torch.equal(output, layer(input)) for output, layer in zip(found, layers, strict=True))


def test_float32_products_are_as_exact_as_float32_arithmetic() -> None:
    """Six products of bfloat16 parts err no more than torch's own float32 product does: by its last bits."""
    input, weight = numbers(500, 1024, dtype=torch.float32), numbers(300, 1024, dtype=torch.float32)
    exact = input.double() @ weight.double().T
    ours, torchs = (
        (found.double() - exact).square().mean().sqrt()
        for found in (TiledProduct(weight, None, "")(input), input @ weight.T)
    )
    assert ours < 1.5 * torchs


def test_numbers_of_all_sizes_keep_their_digits() -> None:
    """A part is never rounded away: from 1e-25 to 1e25, products have float32's relative error."""
    scale = torch.logspace(-25, 25, 64)
    input, weight = torch.diag(scale), numbers(48, 64, dtype=torch.float32)
    found = TiledProduct(weight, None, "")(input)
    torch.testing.assert_close(found.double(), scale.double()[:, None] * weight.double().T, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    """A fault in a text's numbers must be seen, and in that text's row alone."""
    input, weight = numbers(40, 64, dtype=dtype), numbers(64, 64, dtype=dtype)
    input[7, 3] = torch.nan
    for activation in ACTIVATIONS:
        found = TiledProduct(weight, None, activation)(input)
        assert found[7].isnan().all()
        assert not found[[*range(7), *range(8, 40)]].isnan().any()


def test_extreme_numbers_go_through_activations() -> None:
    input = torch.tensor([-1e30, -200.0, -90.0, -10.0, 0.0, 10.0, 90.0, 200.0, 1e30])[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        rows = input.to(dtype)
        for name, activation in ACTIVATIONS.items():
            if name != "gelu_tanh":  # torch's overflows at 1e30
                found = TiledProduct(torch.ones(1, 1, dtype=dtype), None, name)(rows)
                torch.testing.assert_close(found.double(), activation(rows.double()), rtol=1e-2, atol=1e-2)


def test_views_are_read_as_what_they_show() -> None:
    wide, weight = numbers(3, 20, 64, dtype=torch.float32), numbers(16, 32, dtype=torch.float32)
    view = wide[:, ::2, 32:]
    found = TiledProduct(weight, None, "")(view)
    assert found.shape == (3, 10, 16)
    torch.testing.assert_close(found, view @ weight.T, rtol=1e-5, atol=1e-5)


def test_nothing_gives_nothing_and_unlike_shapes_are_refused() -> None:
    product = TiledProduct(numbers(16, 32, dtype=torch.float32), None, "")
    assert product(torch.empty(0, 32)).shape == (0, 16)
    with pytest.raises(ValueError, match=r"\(4, 16\) of torch.float32 and \(1, 16\)"):
        product(torch.empty(4, 32), torch.empty(1, 16), "add")
    with pytest.raises(ValueError, match=r"of torch.bfloat16 for a layer of 32 of torch.float32"):
        product(torch.empty(4, 32, dtype=torch.bfloat16))  # as under autocast: its memory would be read as float32
    with pytest.raises(ValueError, match=r"\(4, 31\)"):
        product(torch.empty(4, 31))
    with pytest.raises(ValueError, match="multiplies nothing else"):
        TiledProduct(numbers(16, 32, dtype=torch.float32), None, "gelu")(torch.empty(4, 32), torch.empty(4, 16), "mul")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [3, 70])
def test_outputs_go_where_they_are_told_to(rows: int, dtype: torch.dtype) -> None:
    up, down = (TiledProduct(numbers(64, 64, dtype=dtype), None, name) for name in ("gelu", ""))
    input, other = numbers(rows, 64, dtype=dtype), numbers(rows, 64, dtype=dtype)
    memory = [torch.full((rows, 64), torch.nan, dtype=dtype) for _ in range(2)]
    assert down(input, other, "add", memory[0]) is memory[0]
    assert torch.equal(memory[0], down(input, other, "add"))
    assert up.feed(down, input, other, memory[1]) is memory[1]
    assert torch.equal(memory[1], up.feed(down, input, other))
    found = down.side_by_side([down], input, memory)
    assert [output.data_ptr() for output in found] == [output.data_ptr() for output in memory]
    assert all(torch.equal(output, down(input)) for output in memory)
    for wrong in (memory[0][:, :32], memory[0][:-1], memory[0].double(), torch.empty(64, rows, dtype=dtype).T):
        with pytest.raises(ValueError, match="an output of"):
            down(input, into=wrong)
        with pytest.raises(ValueError, match="an output of"):
            up.feed(down, input, into=wrong)
        with pytest.raises(ValueError, match="an output of"):
            down.side_by_side([down], input, [memory[0], wrong])
