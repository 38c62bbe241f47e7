"""Quantised weights: one thing of codes and scales, made numbers by a recipe that is told."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt_tool.api import convert, gate, plan, verify
from ckpt_tool.checkpoint.opening import open_checkpoint
from ckpt_tool.convert import quantised_numbers
from ckpt_tool.convert import quantised_values as values
from ckpt_tool.convert.layout import Part, Step, apply, rule
from ckpt_tool.convert.plan import Options
from ckpt_tool.convert.quantised import INT8, Quantised, found_in
from ckpt_tool.convert.quantised_config import RECIPES
from ckpt_tool.convert.quantised_steps import Torn, _grid
from ckpt_tool.convert.quantised_view import as_asked
from ckpt_tool.errors import CkptToolError
from ckpt_tool.fixtures import flaws_packed
from ckpt_tool.fixtures.flaws import Folder, NotHere
from ckpt_tool.fixtures.flaws_kinds import Truth
from ckpt_tool.fixtures.quantised import FORMATS, INTEGERS, Format, Tensors, _fp8, quantise, write
from ckpt_tool.verify import dequantised, packed_bits
from ckpt_tool.verify import mistakes_packed as planting
from ckpt_tool.verify import packed_mistakes as known
from ckpt_tool.verify.compare import compare

Written = Callable[[str], Path]
Made = Callable[[str], Path]
MODEL = "qwen3-float32"
FITTING = [n for n in (*FORMATS, *INTEGERS) if n != "mxfp4"]  # whose rows are of its length
CASES = Path(__file__).parents[2] / "shared" / "cases"
ALL = np.arange(256, dtype=np.uint8)


def exact(code: int) -> float:
    """An E4M3 code by the formula of OFP8 1.0, section 5.2."""
    exponent, fraction = code >> 3 & 15, code & 7
    size = (8 + fraction) * 2.0 ** (exponent - 10) if exponent else fraction * 2.0**-9
    return float("nan") if code & 127 == 127 else -size if code & 128 else size


def bfloat16(numbers: np.ndarray) -> np.ndarray:
    """To nearest, ties to even, through the two neighbours of each number."""
    bits = numbers.astype("<f4").view("<u4")
    low = (bits & 0xFFFF0000).view("<f4").astype("<f8")
    high = ((bits & 0xFFFF0000) + 0x10000).view("<f4").astype("<f8")
    middle = (low + high) / 2
    up = np.where(numbers == middle, bits >> 16 & 1, np.abs(numbers) > np.abs(middle))
    return ((bits >> 16) + up).astype("<u2")


def test_every_code_of_e4m3_is_its_number_signs_of_zero_included() -> None:
    expected = np.array([exact(int(c)) for c in ALL], "<f4")
    found = values.e4m3(ALL)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found[[0, 128]]), [False, True])


@pytest.mark.parametrize("scale", [1e-4, 0.75, 3.1e-39, 129.5, -2.25, 1e30])
def test_a_product_is_rounded_once(scale: float) -> None:
    codes = ALL[(ALL & 127) != 127][None]
    factor = np.array([[scale]], "<f4")
    numbers = np.array([[exact(int(c)) for c in codes[0]]]) * factor.astype("<f8")
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = {"F32": numbers.astype("<f4").view("<u4"), "BF16": bfloat16(numbers)}
        wanted["F16"] = numbers.astype("<f4").astype("<f2").view("<u2")
    for dtype, bits in wanted.items():
        made = np.empty(codes.shape, bits.dtype)
        spans = [values.Span(0, codes.shape, values.factors(factor))]
        values.fp8(codes[0], spans, made[0], dtype)
        inside = np.abs(numbers) < 3e38
        assert np.array_equal(made[inside], bits[inside]), dtype


@pytest.mark.parametrize("factor", ["0x1.4dddde0000000p-7", "0x1.3222220000000p-7"])
def test_a_float32_product_in_the_middle_is_a_tie_whatever_the_exact_one_is(factor: str) -> None:
    """15 times these is a trifle off the middle of two bfloat16 numbers, and the middle in float32: libraries
    that multiply in float32 take the even one, which is not the nearest of the product."""
    scale, fifteen = np.array([float.fromhex(factor)], "<f4"), np.array([0x57], np.uint8)
    (single,) = np.float32(15) * scale
    assert int(single.view("<u4")) & 0xFFFF == 0x8000 and float(single) != 15 * float(scale[0])
    even = int(single.view("<u4") >> 16) + 1 & ~1
    made = np.empty(1, "<u2")
    half_up = bool(values.rounds_half_up(scale[None])[0])
    values.fp8(fifteen, [values.Span(0, (1,), values.factors(scale, half_up))], made, "BF16")
    again = dequantised.to_dtype(dequantised.e4m3(fifteen) * scale.astype("<f8"), "BF16")
    assert int(made[0]) == int(again[0]) == even
    assert even != int(bfloat16(15 * scale.astype("<f8"))[0])


def of_blocks(scales: np.ndarray, shape: tuple[int, int]) -> tuple[Tensors, dict[str, Any]]:
    """One weight of every number code, in blocks of 16 x 24, and what config.json says of it."""
    codes = ALL[(ALL & 127) != 127]
    tensors = {
        "a.weight": ("F8_E4M3", np.resize(codes, shape)),
        "a.weight_scale_inv": ("F32", scales.astype("<f4").view("<u4")),
    }
    return tensors, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 24]}}


@pytest.mark.parametrize("piece", [7, 500, 1 << 17])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
def test_scales_that_round_otherwise_change_their_own_line_alone(
    piece: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines whose products lie in the middle of two numbers, are large, small, zero, below it or infinite,
    beside lines of which none does."""
    scales = np.full((9, 5), 0.0123)
    scales[1], scales[3, 2], scales[4, 1], scales[5, 4], scales[6], scales[7, 0] = (
        1.0625,
        1e30,
        3e-39,
        0,
        -3,
        300,
    )
    scales[8, 3] = np.inf
    shape = 16 * 9 - 5, 24 * 5 - 7
    tensors, settings = of_blocks(scales, shape)
    write(tmp_path / "in.safetensors", tensors)
    monkeypatch.setattr(quantised_numbers, "PIECE", piece)
    monkeypatch.setattr(quantised_numbers, "SCALES", 11)
    with open_checkpoint(tmp_path / "in.safetensors") as stored:
        seen = as_asked(stored, Options(dequantize=dtype, settings=settings))
        found = seen.read(seen.find("a.weight")[0])
    each = np.repeat(np.repeat(scales.astype("<f4"), 16, 0), 24, 1)[: shape[0], : shape[1]].astype("<f8")
    with np.errstate(all="ignore"):
        numbers = np.vectorize(exact)(tensors["a.weight"][1]) * each
        single = numbers.astype("<f4")
        wanted = {
            "F32": single.view("<u4"),
            "F16": single.astype("<f2").view("<u2"),
            "BF16": bfloat16(numbers),
        }
    plain = np.isfinite(numbers) & (np.abs(numbers) < 3e38)
    assert np.array_equal(found[plain], wanted[dtype][plain])
    there = (found.astype("<u4") << 16).view("<f4") if dtype == "BF16" else found.view(f"<f{found.itemsize}")
    assert np.array_equal(np.isnan(there), np.isnan(numbers))


def test_every_byte_of_mxfp4_with_every_scale() -> None:
    halves = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table = np.array([*halves, *(-x for x in map(float, halves))])
    codes, scales = np.repeat(ALL[None, :], 253, 0).reshape(-1, 16), np.repeat(ALL[:253], 16)
    pairs = np.stack([table[codes & 15], table[codes >> 4]], -1).reshape(len(codes), 32)
    numbers = pairs * 2.0 ** (scales.astype("<f8")[:, None] - 127)
    for dtype, kind in (("BF16", "<u2"), ("F32", "<u4")):
        made = np.empty(codes.size * 2, kind)
        values.mxfp4(codes, scales, made, dtype)
        found = made.view("<f4") if dtype == "F32" else (made.astype("<u4") << 16).view("<f4")
        assert np.array_equal(found.reshape(numbers.shape), numbers), dtype
        assert np.array_equal(np.signbit(found.reshape(numbers.shape)), np.signbit(numbers)), dtype


# --- the case with blocks that are not square, and last blocks that are short ---------------------------

BLOCK = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32]}}
SHARED = pytest.mark.skipif(not CASES.exists(), reason="the shared cases are not beside the repository")


@SHARED
@pytest.mark.parametrize("folder", ["hf", "ragged.safetensors"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_blocks_are_those_of_the_config_and_the_recipe_the_one_asked_for(folder: str, recipe: str) -> None:
    options = Options(dequantize="BF16", recipe=recipe, settings=BLOCK)
    case, before = CASES / "fp8-block-tiny", recipe.replace("-", "_")
    with open_checkpoint(case / folder) as stored, open_checkpoint(case / "expected.safetensors") as wanted:
        seen = as_asked(stored, options)
        made = [n for n in seen.names() if f"{before}.{n}" in wanted]
        assert len(made) == (7 if folder == "hf" else 3)
        for name in made:
            (found,), (expected,) = seen.find(name), wanted.find(f"{before}.{name}")
            assert np.array_equal(seen.read(found), wanted.read(expected)), name
            whole = seen.read(found).reshape(-1).view(np.uint8)
            for first, last in ((1, 2), (3, 67), (whole.size // 2 - 1, whole.size)):  # any range of its bytes
                some = np.empty(last - first, np.uint8)
                seen.read_into(found, first, some.data)
                assert np.array_equal(some, whole[first:last])


# --- every format, in a family's own folder -------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(conversions: Written, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`quantised(format)`: a tiny model of one family whose matrices are quantised so."""
    known: dict[str, Path] = {}

    def made(name: str) -> Path:
        if name not in known:
            known[name] = quantise(conversions(MODEL), tmp_path_factory.mktemp("q") / name, name)
        return known[name]

    return made


def held(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    with open_checkpoint(folder) as checkpoint:
        return {t.name: (t.dtype, t.shape, checkpoint.read(t).tobytes()) for t in checkpoint}


@pytest.mark.parametrize("name", FITTING)
def test_what_is_carried_keeps_every_byte_both_ways(name: str, quantised: Made, tmp_path: Path) -> None:
    source = quantised(name)
    done = convert(source, tmp_path / "out")
    assert any("keep their codes and scales" in n for n in done.plan.notes)
    assert held(tmp_path / "out") == held(source)
    said, given = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", source))
    assert said["quantization_config"] == given["quantization_config"]
    report = verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert report.status == "pass", report.headline
    assert any(f.data.get("exactness") == "bit-identical" for f in report.findings)
    convert(tmp_path / "out", tmp_path / "back", to="original")
    assert held(tmp_path / "back") == held(source)


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_numbers_are_proved_by_a_formula_of_their_own(
    name: str, dtype: str, quantised: Made, tmp_path: Path
) -> None:
    options = Options(dequantize=dtype, recipe="bf16-scale" if dtype == "F32" else "fp32-product")
    done = convert(quantised(name), tmp_path / "out", options=options)
    assert done.plan.asked["recipe"] == options.recipe
    assert done.outcome.manifest["options"]["dequantize"] == dtype
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    report = verify(tmp_path / "out", levels=("coverage", "bits"))  # the source by the manifest
    assert report.status == "pass" and options.recipe in report.headline
    (told,) = [f for f in report.findings if f.check == "dequantised"]
    count = sum(n.endswith((".weight_scale", ".scale", "_scale_inv")) for n in held(quantised(name)))
    assert len(told.data["weights"]) == count
    if dtype == "F32" and name in ("fp8-powers", "int4"):
        assert set(told.data["weights"].values()) == {"exact"}
    wide = name == "int8-packed" and dtype == "BF16"  # up to 255 from a zero point, times a float32 scale
    assert ("rounded" in told.data["weights"].values()) == wide


def test_parity_reads_codes_on_both_sides_by_formulas_that_share_nothing(
    quantised: Made, tmp_path: Path, one_thread: None
) -> None:
    convert(quantised("fp8-blocks"), tmp_path / "out")
    report = verify(tmp_path / "out", quantised("fp8-blocks"), levels="parity", mode="quick")
    assert report.status == "pass", report.headline
    with open_checkpoint(tmp_path / "out") as checkpoint:  # in the output alone, where the manifest is stale
        scale = checkpoint.find("model.layers.0.mlp.up_proj.weight_scale_inv")[0]
        grid = checkpoint.read(scale)
    put(tmp_path / "out", scale.name, np.roll(grid, 1, 0))
    report = verify(tmp_path / "out", quantised("fp8-blocks"), levels=("bits", "parity"), mode="quick")
    assert report.status == "fail"
    assert any("one block off along the rows" in f.message for f in report.findings if f.level == "bits")
    report = verify(tmp_path / "out", quantised("fp8-blocks"), levels="parity", mode="quick")
    assert any(f.level == "parity" and f.status == "fail" for f in report.findings)


@pytest.mark.parametrize(
    ("name", "kernel", "place"), [("fp8-blocks", "fp8", 2), ("int4", "grouped", 3), ("nvfp4", "grouped", 3)]
)
def test_a_wrong_number_of_the_converting_formula_is_not_the_formula_of_verify(
    name: str, kernel: str, place: int, quantised: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(values, kernel)

    def wrong(*given: Any, **more: Any) -> None:
        right(*given, **more)
        given[place].reshape(-1)[-1] ^= 1

    monkeypatch.setattr(values, kernel, wrong)
    convert(quantised(name), tmp_path / "out", options=Options(dequantize="BF16"), check=False)
    assert verify(tmp_path / "out", quantised(name), levels="bits").status == "fail"
    monkeypatch.setattr(values, kernel, right)
    convert(quantised(name), tmp_path / "right", options=Options(dequantize="BF16"), check=False)
    monkeypatch.setattr(values, kernel, wrong)
    assert verify(tmp_path / "right", quantised(name), levels="bits").status == "pass"


def exactness_by_number(view: dequantised.Recomputed, weight: Quantised) -> str:
    """Of each number by itself, with the nearest of all codes of the format."""
    shape = weight.shape
    lines, columns = np.arange(shape[0]), np.arange(shape[1])
    codes, scales = view.codes(weight, lines, columns), view.scale_of_each(weight, lines, columns)
    bits = view.bits_of(weight, lines, columns)
    wide = (bits.astype("<u4") << 16).view("<f4") if view.dtype == "BF16" else bits.view(f"<f{bits.itemsize}")
    numbers = wide.astype("<f8")
    with np.errstate(all="ignore"):
        if np.array_equal(numbers, codes * scales, equal_nan=True):
            return packed_bits.EXACT
        each = np.arange(-255.0, 256) if weight.kind == INT8 else np.unique(codes)  # few of 511 are there
        near = each[np.abs((numbers / scales)[..., None] - each).argmin(-1)]
        signs = np.signbit(numbers / scales) == np.signbit(codes)
    return packed_bits.INVERTIBLE if np.array_equal(near, codes) and signs.all() else packed_bits.ROUNDED


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("name", FITTING)
def test_what_is_said_of_all_codes_holds_for_those_that_are_there(
    name: str, dtype: str, quantised: Made
) -> None:
    with open_checkpoint(quantised(name)) as stored:
        found = found_in(stored)
        assert found is not None
        seen = dequantised.recomputed(stored, found, dtype, RECIPES[0])
        made = as_asked(stored, Options(dequantize=dtype))
        for weight in list(found.weights.values())[:3]:
            view = seen.files[weight.codes.file]
            assert isinstance(view, dequantised.Recomputed)
            whole = made.read(made.find(weight.name)[0]).reshape(-1).view("u1")
            for first, last in (
                (1, 2),
                (3, 670),
                (whole.size // 2 - 1, whole.size),
            ):  # any range of its bytes
                some = bytearray(last - first)
                view.read_into(weight.name, first, memoryview(some))
                assert bytes(some) == whole[first:last].tobytes()
            assert packed_bits._exactness(view, weight) == exactness_by_number(view, weight), weight.name


def test_what_float32_cannot_see_is_judged_where_it_is_seen(
    quantised: Made, tmp_path: Path, one_thread: None
) -> None:
    """An epsilon whose tenfold is too small a mistake there: the right one passes, one a hundredth off
    fails."""
    source = Path(shutil.copytree(quantised("fp8-blocks"), tmp_path / "in"))
    rewrite(source / "config.json", {"rms_norm_eps": 1e-9})
    convert(source, tmp_path / "out")
    report = verify(tmp_path / "out", source, levels="parity", mode="quick")
    assert report.status == "pass", report.headline
    (control,) = (f for f in report.findings if f.check == "negative control")
    assert {w["dtype"] for w in control.data["judged_in"]} == {"float64"}
    assert all(w["agrees"] and w["nmse"] < 1e-25 for w in control.data["judged_in"])
    assert "which float32 cannot see, in float64: rms_norm_eps" in control.message
    rewrite(tmp_path / "out" / "config.json", {"rms_norm_eps": 1.01e-9})
    report = verify(tmp_path / "out", source, levels="parity", mode="quick")
    assert report.status == "fail" and "differ in float64" in report.headline
    states = {f.check: f.status for f in report.findings if f.level == "parity"}
    assert states["lockstep"] == "pass" and states["negative control"] == "undecided"


def rewrite(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def put(folder: Path, name: str, bits: np.ndarray) -> None:
    with open_checkpoint(folder) as checkpoint:
        (tensor,) = checkpoint.find(name)
        extent = checkpoint.files[tensor.file].extent(name)
    assert extent is not None and bits.nbytes == tensor.nbytes
    with open(folder / tensor.file, "r+b") as file:
        file.seek(extent[1])
        file.write(np.ascontiguousarray(bits).tobytes())


TRIED = {  # of mistakes that have a place in many formats; benchmarks/detection.py has all in each
    "fp8-blocks": "",
    "fp8-powers": "exponent|dropped|inverted",
    "fp8-tensor": "dropped|rounded",
    "nvfp4": "nibble|global|rounded",
    "int4": "nibble|sign|half",
    "int4-shifted": "nibble|zero",
    "modelopt": "nibble|global|divided|rounded",
}


@pytest.mark.parametrize("name", TRIED)
def test_every_known_mistake_is_caught_located_and_named(name: str, quantised: Made, tmp_path: Path) -> None:
    """With codes and scales that were carried, and with numbers that were made of them."""
    source, missed, places = quantised(name), [], 0
    carried: dict[str, Callable[[Folder], Truth]] = dict(flaws_packed.CARRIED)
    numbers = {n: partial(p, coded=source) for n, p in flaws_packed.NUMBERS.items()}
    for options, kinds in ((Options(), carried), (Options(dequantize="BF16"), numbers)):
        right = tmp_path / str(options.dequantize)
        convert(source, right, options=options, check=False)
        for kind, plant in ((k, p) for k, p in kinds.items() if re.search(TRIED[name], k)):
            out = Path(shutil.copytree(right, tmp_path / "out"))
            folder = Folder(out)
            try:
                truth = plant(folder)
                report = verify(out, source, levels="bits")
                (found,) = report.level("diagnosis")
                named = found.where == "layer 1" and truth.names(str(found.data["cause"]))
                missed += [] if report.status == "fail" and named else [(kind, found.message)]
                places += 1
            except NotHere:
                pass
            finally:
                folder.checkpoint.close()
                shutil.rmtree(out)
    assert not missed
    assert places >= (20 if name == "fp8-blocks" else 4)


@pytest.mark.parametrize(("name", "dtype"), [("fp8-blocks", None), ("int4", "BF16"), ("nvfp4", None)])
def test_mistakes_of_the_format_are_planted_in_each_parity(
    name: str, dtype: str | None, quantised: Made, tmp_path: Path, one_thread: None
) -> None:
    """In the weight of a layer that shows them least; a weight that is normed at once would not show one
    scale of the whole."""
    convert(quantised(name), tmp_path / "out", options=Options(dequantize=dtype), check=False)
    report = verify(tmp_path / "out", quantised(name), levels="parity", mode="quick")
    assert report.status == "pass", report.headline
    (control,) = (f for f in report.findings if f.check == "negative control")
    rows = [row for row in control.tables[0].rows if "o_proj: " in str(row[1])]
    planted = {str(mistake).partition(": ")[2] for _, mistake, _, _ in rows}
    assert {phase for phase, *_ in rows} == {"layer 0"}  # the last one too where layers are of several kinds
    assert all(caught == "yes" for *_, caught in rows)
    own = {
        "fp8-blocks": {known.ROUNDED, known.DIVIDED, known.TURNED},
        "int4": {known.EXCHANGED, known.SIGNED},
        "nvfp4": {known.EXCHANGED, known.MULTIPLIED, known.ROUNDED},
    }[name]
    every = {known.DROPPED, known.TWICE, known.INVERTED, known.TRANSPOSED, known.ROWS_OFF, known.COLUMNS_OFF}
    assert planted >= own | every | {known.HALVED}


@pytest.mark.parametrize("name", FITTING)
def test_planted_mistakes_start_from_the_right_numbers(name: str, quantised: Made) -> None:
    """Zero points and a second scale, whichever way it counts, are in what goes wrong from there on."""
    import torch

    with open_checkpoint(quantised(name)) as stored:
        found, numbers = found_in(stored), as_asked(stored, Options(dequantize="F32"))
        assert found is not None
        weight = next(w for n, w in found.weights.items() if n.endswith("o_proj.weight"))
        coded = planting.Coded(stored, weight, found.scheme.block, found.scheme.group)
        parts = coded.parts(None, torch.float32)
        assert np.array_equal(parts.right.numpy(), np.asarray(numbers[weight.name]))
    own = {
        known.UNSHIFTED: name in ("int4-shifted", "int8-packed"),
        known.SIGNED: name == "int4",
        known.UNSIGNED: name == "int8",
        known.MULTIPLIED: name == "nvfp4",
        known.DIVIDED_BY: name == "modelopt",
    }
    assert {words: planting._applies(parts, planting.WRONG[words]) for words in own} == own


def test_the_recipe_of_somebody_elses_numbers_is_recognised(quantised: Made, tmp_path: Path) -> None:
    for recipe in RECIPES:
        out = tmp_path / recipe
        convert(quantised("fp8-blocks"), out, options=Options(dequantize="BF16", recipe=recipe))
        (out / "ckpt-tool.json").unlink()
        report = verify(out, quantised("fp8-blocks"), levels=("coverage", "bits"))
        assert report.status == "fail"
        (told,) = [f for f in report.findings if "dequantised" in f.data]
        assert told.data["recipe"] == recipe and f"by the recipe {recipe}" in told.message
        accepted = verify(
            out, quantised("fp8-blocks"), levels=("coverage", "bits"), accept=["dequantised-to-bfloat16"]
        )
        assert accepted.status == "pass", accepted.headline


# --- what is refused ------------------------------------------------------------------------------------


def changed(source: Path, out: Path, change: Callable[[Tensors, dict[str, Any]], None]) -> Path:
    """A copy of a folder with other tensors (dtype, bits by name) or another config.json."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    with open_checkpoint(source) as checkpoint:
        tensors = {t.name: (t.dtype, checkpoint.read(t)) for t in checkpoint}
    change(tensors, config)
    write(out / "model.safetensors", tensors)
    (out / "config.json").write_text(json.dumps(config))
    return out


CODES, GRID = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight_scale_inv"


def scaled(value: float) -> Callable[[Tensors, dict[str, Any]], None]:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        grid = tensors[GRID][1].copy()
        grid[0, 0] = np.float32(value).view("<u4")
        tensors[GRID] = "F32", grid

    return change


def other(key: str, value: object) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, config: config["quantization_config"].update({key: value})


def without_scales(tensors: Tensors, config: dict[str, Any]) -> None:
    for name in [n for n in tensors if n.endswith("scale_inv")]:
        del tensors[name]


REFUSED = {
    "no scales": (lambda t, c: t.pop(GRID), "missing-tensor", GRID, "get the whole release"),
    "no scales at all": (without_scales, "missing-tensor", "weight_scale_inv", "get the whole release"),
    "no codes": (lambda t, c: t.pop(CODES), "missing-tensor", CODES, ""),
    "scales of plain numbers": (
        lambda t, c: t.update({CODES: ("BF16", np.full(t[CODES][1].shape, 0x3F80, "<u2"))}),
        "uncovered-tensors",
        GRID,
        "--drop",
    ),
    "another grid": (
        lambda t, c: t.update({GRID: ("F32", t[GRID][1][:-1])}),
        "shape-mismatch",
        GRID,
        "a last block may be short",
    ),
    "a transposed grid": (
        lambda t, c: t.update({GRID: ("F32", t[GRID][1].T)}),
        "shape-mismatch",
        GRID,
        "a last block may be short",
    ),
    "another block": (
        other("weight_block_size", [128, 128]),
        "shape-mismatch",
        "weight_scale_inv",
        "config.json",
    ),
    "no block": (other("weight_block_size", None), "config-mismatch", "weight_scale_inv", "--set"),
    "no config": (
        lambda t, c: c.pop("quantization_config"),
        "missing-fact",
        "quantization_config.weight_block_size",
        "--set quantization_config=",
    ),
    "another format": (
        lambda t, c: c.update(quantization_config={"quant_method": "mxfp4"}),
        "config-mismatch",
        "weight",
        "--set quantization_config",
    ),
    "an odd block": (other("weight_block_size", [16]), "bad-config", "weight_block_size", ""),
    "another method": (other("quant_method", "awq"), "unsupported", "quant_method", ""),
    "an unknown key": (other("rotation", "hadamard"), "unsupported", "rotation", "--set"),
    "integer scales": (
        lambda t, c: t.update({GRID: ("I32", t[GRID][1])}),
        "unsupported-dtype",
        GRID,
        "",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_says_why_and_the_way_out(what: str, quantised: Made, tmp_path: Path) -> None:
    change, kind, where, hint = REFUSED[what]
    source = changed(quantised("fp8-blocks"), tmp_path / "in", change)
    for options in (Options(), Options(dequantize="BF16")):
        with pytest.raises(CkptToolError) as caught:
            plan(source, options=options)
        problem = caught.value.problems[0]
        assert (problem.kind, caught.value.exit_code) == (kind, 2), problem
        assert where in (problem.where or "")
        assert hint in (problem.hint or "")


def test_a_block_that_no_config_says_may_be_given(quantised: Made, tmp_path: Path) -> None:
    source = changed(quantised("fp8-blocks"), tmp_path / "in", lambda t, c: c.pop("quantization_config"))
    said = {"quant_method": "fp8", "weight_block_size": [16, 24]}
    options = Options(settings={"quantization_config": said}, dequantize="BF16")
    convert(source, tmp_path / "out", options=options)
    convert(quantised("fp8-blocks"), tmp_path / "right", options=Options(dequantize="BF16"))
    assert held(tmp_path / "out") == held(tmp_path / "right")


def test_a_scale_for_each_row_and_more_of_them_contradict_each_other(quantised: Made, tmp_path: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = -1

    source = changed(quantised("int4"), tmp_path / "in", change)
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    kinds = {(p.kind, (p.where or "").rsplit(".", 1)[1]) for p in caught.value.problems}
    assert kinds == {("config-mismatch", "weight_scale")}
    text = caught.value.problems[0].message
    assert re.fullmatch(
        r"expected one scale for each of (\d+) rows, as config.json says \(group_size -1\), "
        r"found scales of shape \(\1, \d\)",
        text,
    ), text


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_numbers_are_not_made_of_scales_that_are_none(
    value: float, words: str, quantised: Made, tmp_path: Path
) -> None:
    source = changed(quantised("fp8-blocks"), tmp_path / "in", scaled(value))
    with pytest.raises(CkptToolError) as caught:
        convert(source, tmp_path / "out", options=Options(dequantize="BF16"))
    assert caught.value.kind == "bad-scales" and words in caught.value.problems[0].message
    assert not (tmp_path / "out").exists()
    done = convert(source, tmp_path / "carried", check=False)  # as it is, and told
    assert {"odd-scales", "non-finite"} <= {f.kind for f in done.outcome.findings}


@pytest.mark.parametrize(("value", "words"), [(0.0, "zero"), (-0.5, "negative")])
def test_odd_scales_are_told(value: float, words: str, quantised: Made, tmp_path: Path) -> None:
    source = changed(quantised("fp8-blocks"), tmp_path / "in", scaled(value))
    done = convert(source, tmp_path / "out", options=Options(dequantize="BF16"), check=False)
    (odd,) = [f for f in done.outcome.findings if f.kind == "odd-scales"]
    assert words in odd.message and odd.tensor == GRID and odd.details["first"] == [0, 0]


def test_codes_that_are_nan_are_told_and_stay_so(quantised: Made, tmp_path: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        codes = tensors[CODES][1].copy()
        codes[3, 5], codes[3, 6] = 0x7F, 0xFF
        tensors[CODES] = "F8_E4M3", codes

    source = changed(quantised("fp8-blocks"), tmp_path / "in", change)
    for name, options in (("numbers", Options(dequantize="BF16")), ("codes", Options())):
        done = convert(source, tmp_path / name, options=options, check=False)
        (told,) = [f for f in done.outcome.findings if f.kind == "non-finite"]
        assert told.tensor == CODES
        with pytest.raises(CkptToolError, match="non-finite"):
            convert(source, tmp_path / f"{name}-strict", options=options, strict=True)
    with open_checkpoint(tmp_path / "numbers") as checkpoint:
        assert np.isnan(np.asarray(checkpoint[CODES])[3, 5:7]).all()
    (told,) = [
        f for f in verify(tmp_path / "numbers", source, levels="bits").findings if f.check == "dequantised"
    ]
    kinds = told.data["weights"]  # two codes became one NaN, so not every code comes back
    assert kinds.pop(CODES) == packed_bits.NAN_LOST and set(kinds.values()) == {packed_bits.INVERTIBLE}
    assert f"{packed_bits.INVERTIBLE}, 1 {packed_bits.NAN_LOST}" in told.message


def test_code_255_of_a_scale_is_refused_where_libraries_disagree(quantised: Made, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.scale"

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        grid = tensors[name][1].copy()
        grid[0, 0] = 255
        tensors[name] = "F8_E8M0", grid

    source = changed(quantised("fp8-powers"), tmp_path / "in", change)
    with pytest.raises(CkptToolError, match="code 255") as caught:
        convert(source, tmp_path / "out", options=Options(dequantize="F32"))
    assert caught.value.kind == "bad-scales"


def test_a_cast_is_no_way_to_make_numbers_of_codes(quantised: Made) -> None:
    with pytest.raises(CkptToolError, match="--dequantize bfloat16") as caught:
        plan(quantised("fp8-blocks"), options=Options(dtype="BF16"))
    assert caught.value.kind == "usage"
    with pytest.raises(CkptToolError, match="rounds once"):
        plan(quantised("fp8-blocks"), options=Options(dtype="BF16", dequantize="F32"))


def test_scales_of_inputs_are_left_out_of_numbers_and_that_is_told(quantised: Made) -> None:
    made = plan(quantised("fp8-tensor"), options=Options(dequantize="BF16"))
    assert any("scales of the inputs of 21 weights are left out" in words for words in made.lossy), made.lossy


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["lm_head", "model.layers.1", "mlp.up_pro", "layers.0"], 7),
        (["down_proj", "model.layers.1.mlp.down_proj"], 3),
        (["model.layers.1.mlp.up_proj"], 1),
        (["model.layers.*.mlp", "", 5], 0),
    ],
)
def test_codes_that_config_json_calls_plain_are_told(
    names: list[Any], count: int, quantised: Made, tmp_path: Path
) -> None:
    source = changed(quantised("fp8-blocks"), tmp_path / "in", other("modules_to_not_convert", names))
    told = [n for n in plan(source).notes if "is not quantised" in n]
    assert len(told) == bool(count), told
    assert count < 2 or f", and {count - 1} more:" in told[0]


@pytest.mark.parametrize(
    ("name", "said", "told"),
    [
        ("fp8-blocks", {"activation_scheme": "static"}, True),
        ("fp8-blocks", {}, False),
        ("fp8-tensor", {}, False),  # which has them
        (
            "fp8-rows",
            {"config_groups": {"g": {"weights": {}, "input_activations": {"dynamic": False}}}},
            True,
        ),
        (
            "fp8-rows",
            {"config_groups": {"g": {"weights": {}, "input_activations": {"dynamic": True}}}},
            False,
        ),
    ],
)
def test_scales_of_inputs_that_are_said_and_missing_are_told(
    name: str, said: dict[str, Any], told: bool, quantised: Made, tmp_path: Path
) -> None:
    settings = json.loads(json.dumps(FORMATS[name].config)) | said
    for group in settings.get("config_groups", {}).values():
        group["weights"] = FORMATS[name].config["config_groups"]["group_0"]["weights"]
    options = Options(settings={"quantization_config": settings})
    notes = plan(quantised(name), options=options).notes
    assert any("inputs have stored scales, and 21 of 21" in n for n in notes) == told, notes


@pytest.mark.parametrize(("name", "same"), [("nvfp4", True), ("int4", True), ("fp8-blocks", False)])
def test_a_recipe_that_changes_nothing_says_so(name: str, same: bool, quantised: Made) -> None:
    for recipe in RECIPES:
        made = plan(quantised(name), options=Options(dequantize="BF16", recipe=recipe))
        told = any("fp32-product makes the same" in words for words in made.lossy)
        assert told == (same and recipe == "bf16-scale")


def test_one_scale_is_one_whatever_its_shape(quantised: Made, tmp_path: Path) -> None:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("scale_inv")]:
            tensors[name] = "F32", tensors[name][1].reshape(1, 1)

    source = changed(quantised("fp8-tensor"), tmp_path / "in", change)
    numbers = Options(dequantize="BF16")
    for folder, name in ((source, "out"), (quantised("fp8-tensor"), "right")):
        convert(folder, tmp_path / name, options=numbers)
    assert held(tmp_path / "out") == held(tmp_path / "right")


def grouped(**weights: object) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 24]} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": groups}


@pytest.mark.parametrize("weights", [{}, {"block_structure": "16x24"}, {"actorder": "static"}])
def test_what_compressed_tensors_says_of_blocks(
    weights: dict[str, Any], quantised: Made, tmp_path: Path
) -> None:
    source = changed(
        quantised("fp8-blocks"),
        tmp_path / "in",
        lambda t, c: c.update(quantization_config=grouped(**weights)),
    )
    with open_checkpoint(source) as checkpoint:
        found = found_in(checkpoint)
    assert found is not None and found.words == ["fp8 in blocks of 16 x 24"]


@pytest.mark.parametrize(
    "said", [grouped(actorder="group"), grouped() | {"format": ["x"]}, grouped(block_structure="16")]
)
def test_what_compressed_tensors_says_oddly_is_refused(
    said: dict[str, Any], quantised: Made, tmp_path: Path
) -> None:
    source = changed(
        quantised("fp8-blocks"), tmp_path / "in", lambda t, c: c.update(quantization_config=said)
    )
    with pytest.raises(CkptToolError) as caught:
        plan(source)
    assert caught.value.kind in ("unsupported", "bad-config")


# --- rows over blocks -----------------------------------------------------------------------------------


def grids(pattern: str, sizes: dict[str, int], block: tuple[int, int], **more: Any) -> list[np.ndarray]:
    """What a row makes of the grid 0, 1, 2, ... of one matrix, held against every number of it."""
    row = rule("a.weight", more.pop("target", "b.weight"), pattern, **more)
    axes = tuple((a, sizes[a]) for g in row.left for a in g)
    targets = tuple(Part("", n, "U8", row.right, ranges) for n, ranges in more_parts(row, sizes))
    step = Step(axes, (Part("f", "a.weight", "U8", row.left),), targets)
    places = tuple(p.place for p in step.sources), tuple(p.place for p in step.targets)
    grid_axes, left, right = _grid(axes, *places, block, False)
    sources = tuple(Part("f", "a", "U8", d, r) for d, r in zip(*left, strict=True))
    made = tuple(Part("", "b", "U8", d, r) for d, r in zip(*right, strict=True))
    whole = Step(axes, step.sources, step.targets)
    rows, columns = step.sources[0].shape(dict(axes))
    grid = np.arange(-(-rows // block[0]) * -(-columns // block[1]), dtype="u1")
    grid = grid.reshape(-(-rows // block[0]), -1)
    found = apply(Step(grid_axes, sources, made), [grid])
    each = apply(whole, [grid.repeat(block[0], 0).repeat(block[1], 1)[:rows, :columns]])
    for g, numbers in zip(found, each, strict=True):
        shown = g.repeat(block[0], 0).repeat(block[1], 1)[: numbers.shape[0], : numbers.shape[1]]
        assert np.array_equal(shown, numbers), pattern
    return found


def more_parts(row: Any, sizes: dict[str, int]) -> list[tuple[str, Any]]:
    if len(row.target) == 1:
        return [(row.target[0], ())]
    edges = np.cumsum([0, *row.cut_sizes]).tolist()
    return [(n, ((row.cut, a, b),)) for n, a, b in zip(row.target, edges, edges[1:], strict=False)]


SIZES = {"n": 4, "half": 8, "two": 2, "d": 40, "s": 3, "h": 16, "r": 36}
LEGAL = {
    "nothing moves": ("r d", (16, 32), {}),
    "inside of a block of two heads": ("(n half two) d -> (n two half) d", (32, 32), {}),
    "inside of a block of one head": ("(n half two) d -> (n two half) d", (16, 32), {}),
    "a short last block": ("(n half two) d -> (n two half) d", (48, 32), {}),
    "whole blocks change places": ("(n s h) d -> (s n h) d", (8, 32), {}),
    "a cut on the edge of a block": (
        "(s h) d",
        (16, 32),
        {"cut": ("s", (2, 1)), "target": ("b.weight", "c.weight")},
    ),
    "a cut of groups": ("(n s h) d", (16, 32), {"cut": ("s", (2, 1)), "target": ("b.weight", "c.weight")}),
}
TORN = {
    "a head of two blocks": ("(n half two) d -> (n two half) d", (8, 32), {}),
    "a block of one head and a half": ("(n half two) d -> (n two half) d", (24, 32), {}),
    "a cut inside of a block": (
        "(s h) d",
        (32, 32),
        {"cut": ("s", (1, 2)), "target": ("b.weight", "c.weight")},
    ),
    "a transpose": ("r d -> d r", (16, 32), {}),
}


@pytest.mark.parametrize("what", LEGAL)
def test_a_row_moves_whole_blocks(what: str) -> None:
    pattern, block, more = LEGAL[what]
    assert grids(pattern, SIZES, block, **more)


@pytest.mark.parametrize("what", TORN)
def test_a_row_that_tears_a_block_is_refused(what: str) -> None:
    pattern, block, more = TORN[what]
    with pytest.raises(Torn, match="whole blocks"):
        grids(pattern, SIZES, block, **more)


def test_words_of_codes_move_whole_and_in_order() -> None:
    """A scale may stay where rows move inside of its block; a word that holds a code of each may not."""
    axes = (("n", 4), ("half", 2), ("two", 4), ("d", 32))
    for rows in (("n", "two", "half"), ("half", "n", "two")):
        places = tuple(((r, ("d",)), (), ()) for r in (("n", "half", "two"), rows))
        _grid(axes, places[:1], places[1:], (32, 32), False)
        with pytest.raises(Torn, match="whole blocks"):
            _grid(axes, places[:1], places[1:], (32, 32), False, True)
    (_, (left, _), (right, _)) = _grid(axes, places[:1], places[1:], (4, 32), False, True)
    assert (left[0][0], right[0][0]) == (("n", "half", "two_blocks"), ("half", "n", "two_blocks"))


def test_what_would_be_torn_is_refused_by_name_with_the_way_out(conversions: Written, tmp_path: Path) -> None:
    """Heads of ten rows in blocks of sixteen, which the layout of the original turns to pairs."""
    source = quantise(conversions("mistral-7b-v0.1"), tmp_path / "in", "fp8-blocks")
    with pytest.raises(CkptToolError) as caught:
        plan(source, to="original")
    (problem,) = caught.value.problems  # and none of what would be left over
    assert problem.kind == "unsupported" and "--dequantize" in (problem.hint or "")
    convert(source, tmp_path / "out", to="original", options=Options(dequantize="BF16"))
    report = verify(tmp_path / "out", source, levels=("coverage", "bits"))
    assert report.status == "pass", report.headline


def test_what_is_torn_is_said_once_with_the_count(
    conversions: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query, key and value of CodeGen lie in turns, and its layers are alike."""
    said = {**FORMATS["fp8-blocks"].config, "weight_block_size": [7, 24]}
    make = partial(_fp8, block=(7, 24), end=".weight_scale_inv")
    monkeypatch.setitem(FORMATS, "fp8-blocks", Format(make, said))
    source = quantise(conversions("codegen-350m-mono"), tmp_path / "in", "fp8-blocks")
    with pytest.raises(CkptToolError) as caught:
        plan(source, to="original")
    (problem,) = caught.value.problems
    assert problem.where.endswith("h.0.attn.qkv_proj.weight") and "more weights alike" in problem.message


@pytest.mark.parametrize("container", [None, "pth"])
def test_codes_leave_the_container_that_has_no_reader_of_them(
    container: str | None, conversions: Written, tmp_path: Path
) -> None:
    source = quantise(conversions("codegen-350m-mono"), tmp_path / "in", "int4")
    options = Options(family_options={} if container is None else {"container": container})
    if container is None:  # the family's usual one is a .bin
        made = convert(source, tmp_path / "original", to="original", options=options)
        convert(tmp_path / "original", tmp_path / "again")
        assert held(tmp_path / "again") == held(source)
        assert any("as safetensors" in note for note in made.plan.notes)
    else:
        with pytest.raises(CkptToolError) as caught:
            plan(source, to="original", options=options)
        assert "--container safetensors" in (caught.value.problems[0].hint or "")


def test_ranks_of_codes_say_what_would_work(quantised: Made) -> None:
    with pytest.raises(CkptToolError) as caught:
        plan(quantised("fp8-tensor"), to="original", options=Options(shards=2))
    (problem,) = caught.value.problems
    assert "share out to ranks themselves" in (problem.hint or "") and "--dequantize" in (problem.hint or "")


INT4 = "model.layers.1.mlp.up_proj.weight"
ODD = {
    "int4": [
        (lambda t: t.update({f"{INT4}_shape": ("I64", np.array([344, 60], "<u8"))}), "shape-mismatch"),
        (lambda t: t.pop(f"{INT4}_shape"), "missing-tensor"),
        (lambda t: t.update({f"{INT4}_scale": ("BF16", t[f"{INT4}_scale"][1][:, :1])}), "shape-mismatch"),
        (lambda t: t.update({f"{INT4}_zero_point": ("I32", t[f"{INT4}_packed"][1][:43])}), "config-mismatch"),
    ],
    "nvfp4": [
        (lambda t: t.update({f"{INT4}_packed": ("U8", t[f"{INT4}_packed"][1][:, :-1])}), "shape-mismatch"),
        (lambda t: t.pop(f"{INT4}_global_scale"), "missing-tensor"),
    ],
}


@pytest.mark.parametrize("name", ODD)
def test_codes_of_four_bits_that_do_not_add_up_are_refused(
    name: str, quantised: Made, tmp_path: Path
) -> None:
    for k, (change, kind) in enumerate(ODD[name]):
        source = changed(quantised(name), tmp_path / f"in{k}", lambda t, c, change=change: change(t))
        with pytest.raises(CkptToolError) as caught:
            plan(source)
        assert caught.value.kind == kind, caught.value.text()
        assert (caught.value.problems[0].where or "").startswith(INT4)


@SHARED
def test_logits_of_both_readings_are_those_of_transformers(one_thread: None) -> None:
    """Of matrices that are left in float32; recorded with transformers 5.23.0."""
    import torch

    from ckpt_tool import reference
    from ckpt_tool.verify.packed_weights import PackedWeights
    from ckpt_tool.verify.weights import ranks_of

    case = CASES / "fp8-block-tiny"
    with open_checkpoint(case / "hf") as stored, open_checkpoint(case / "expected.safetensors") as wanted:
        ids = torch.from_numpy(np.asarray(wanted["ids"]).astype("i8")).reshape(1, -1)
        expected = np.asarray(wanted["logits_float32_of_fp32_weights"])
        config = {k: v for k, v in stored.json("config.json").items() if k != "quantization_config"}
        found = found_in(stored)
        assert found is not None
        for original in (True, False):
            weights = PackedWeights(stored, ranks_of(stored)[0], torch.float32, "cpu", found, original)
            if original:
                module = reference.original("qwen3")
                shapes = {n: t.shape for n, t in weights.tensors.items()}
                known = module.Config.from_original(config, shapes, 1, {})
            else:
                module = reference.converted("Qwen3ForCausalLM")
                known = module.Config.from_hf(config)
            logits = module.forward(ids, [weights], known).numpy().reshape(expected.shape)
            assert np.abs(logits - expected).max() < 1e-4


def test_numbers_that_are_made_of_codes_come_out_of_the_memory(quantised: Made, tmp_path: Path) -> None:
    """While they are made nothing else may take their room, in float64 either; less is refused."""
    import torch

    from ckpt_tool.verify import pace
    from ckpt_tool.verify.effort import THOROUGH
    from ckpt_tool.verify.needs import COMPUTING
    from ckpt_tool.verify.packed_weights import PackedWeights
    from ckpt_tool.verify.prompts import Prompt
    from ckpt_tool.verify.sides import converted_side, original_side
    from ckpt_tool.verify.subject import opened

    convert(quantised("fp8-blocks"), tmp_path / "out")
    prompts = {"one": Prompt([[1, 2, 3]], {})}
    with opened(tmp_path / "out", quantised("fp8-blocks"), {}) as subject:
        sides = [make(subject, torch.float32, "cpu") for make in (original_side, converted_side)]
        weights = [side.weights[0] for side in sides]
        assert isinstance(weights[1], PackedWeights)
        most = max(weights[1].tensors[n].numel for n in weights[1].formulas)
        assert {w.making for w in weights} == {4 * 8 * most} and weights[1].exchanged == 2 * 4 * most
        pace.limit(*sides, prompts, THOROUGH, 2 * 10**9)
        activations = pace._passes(sides[1], prompts, THOROUGH).activations(4)
        whole = 2 * 10**9 - COMPUTING - activations - 4 * 8 * most
        assert weights[0].room.size == whole and weights[1].room.size <= whole - weights[1].exchanged
        least = COMPUTING + activations + weights[1].making + weights[1].exchanged
        with pytest.raises(CkptToolError, match="memory: expected at least"):
            pace.limit(*sides, prompts, THOROUGH, least)


def test_a_gate_foretells_what_numbers_take_while_they_are_made(quantised: Made, tmp_path: Path) -> None:
    """As parity does of the same folders; a conversion to numbers has none to make there."""
    from ckpt_tool.verify import needs
    from ckpt_tool.verify.gate import Check

    convert(quantised("fp8-blocks"), tmp_path / "out")
    check = Check("a", str(tmp_path / "out"), str(quantised("fp8-blocks")), levels=("parity",), mode="quick")
    report = verify(check.out, check.source, levels=("parity",), mode="quick")
    assert report.facts["needs"] == f"about {needs.size_text(needs.of_check(check) or 0)} of memory"
    with open_checkpoint(check.out) as checkpoint:
        found = found_in(checkpoint)
    assert found is not None
    most = max(int(np.prod(w.shape)) for w in found.weights.values())
    assert needs._of_codes(check, found, 4) == (4 * most * 8, 2 * most * 4)
    assert needs._of_codes(replace(check, dequantize="BF16"), found, 4) == (0, 0)
    own = {n: replace(w, form=replace(w.form, own_rows=True)) for n, w in found.weights.items()}
    with open_checkpoint(check.out) as checkpoint:
        assert needs._as_numbers(checkpoint, replace(found, weights=own)) == [*checkpoint]
        assert {t.name for t in needs._as_numbers(checkpoint, found)} == {
            t.name for t in checkpoint if not t.name.endswith("_scale_inv") and not t.name.endswith("_scale")
        }


@pytest.mark.parametrize("form", ["mcore", "torch_dist"])
def test_ranks_take_numbers_and_no_codes(form: str, quantised: Made) -> None:
    options = Options(family_options={"form": form})
    with pytest.raises(CkptToolError) as caught:
        plan(quantised("fp8-tensor"), to="original", options=options)
    problem = caught.value.problems[0]
    assert problem.kind == "unsupported" and "--dequantize" in (problem.hint or "")
    assert plan(quantised("fp8-tensor"), to="original", options=replace(options, dequantize="BF16")).steps


def test_scales_may_stand_in_another_file_than_their_codes(quantised: Made, tmp_path: Path) -> None:
    source, apart = quantised("fp8-blocks"), tmp_path / "apart"
    apart.mkdir()
    with open_checkpoint(source) as checkpoint:
        tensors = {t.name: (t.dtype, checkpoint.read(t)) for t in checkpoint}
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    homes = {n: names[n.endswith("scale_inv")] for n in tensors}
    for name in names:
        write(apart / name, {n: t for n, t in tensors.items() if homes[n] == name})
    index = {"metadata": {}, "weight_map": homes}
    (apart / "model.safetensors.index.json").write_text(json.dumps(index))
    (apart / "config.json").write_text((source / "config.json").read_text())
    for name, options in (("carried", Options()), ("numbers", Options(dequantize="BF16"))):
        convert(apart, tmp_path / name, options=options)
        convert(source, tmp_path / f"{name}-right", options=options)
        assert held(tmp_path / name) == held(tmp_path / f"{name}-right")
        assert verify(tmp_path / name, apart, levels=("coverage", "bits")).status == "pass"


def test_a_gate_makes_numbers_of_codes(quantised: Made, tmp_path: Path) -> None:
    entries = (
        ("numbers", 'dequantize = "bfloat16"\nrecipe = "bf16-scale"'),
        ("codes", ""),
        ("half", 'recipe = "bf16-scale"'),
    )
    checks = [
        f'[[check]]\nname = "{name}"\nconvert = "auto"\nsource = "{quantised("fp8-blocks")}"\n'
        f'out = "{name}"\nlevels = ["coverage", "bits"]\n{said}\n'
        for name, said in entries
    ]
    (tmp_path / "parity.toml").write_text("\n".join(checks))
    numbers, codes, half = gate(tmp_path / "parity.toml").reports
    assert numbers.status == codes.status == "pass" and "recipe bf16-scale" in numbers.headline
    assert half.could_not_run and not (tmp_path / "half").exists()


def test_codes_are_compared_with_the_numbers_that_they_mean(quantised: Made, tmp_path: Path) -> None:
    source = quantised("fp8-blocks")
    assert compare(source, source, logits=False).same == "bit-identical"
    for recipe in RECIPES:
        out = tmp_path / recipe
        convert(source, out, options=Options(dequantize="bfloat16", recipe=recipe), check=False)
        for a, b, side in ((source, out, "A"), (out, source, "B")):
            report = compare(a, b, logits=False)
            assert report.status == "pass" and report.exactness == "identical after cast"
            (told,) = [f for f in report.findings if f.check == "quantised"]
            assert told.where == side and f"recipe {recipe}" in told.message
    other_block = other("weight_block_size", [16, 23])  # of a grid of the same shape
    report = compare(source, changed(source, tmp_path / "block", other_block), logits=False)
    assert report.status == "fail" and "21 of 36 tensors differ" in report.headline


def test_dtypes_have_all_their_names_in_options_too() -> None:
    assert Options(dtype="bfloat16", dequantize="float32") == Options(dtype="BF16", dequantize="F32")
    for asked in ({"dtype": "int8"}, {"dequantize": "float64"}, {"recipe": "none"}):
        with pytest.raises(CkptToolError) as caught:
            Options(**asked)  # type: ignore[arg-type]
        assert caught.value.kind == "usage"


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-rows"])
def test_codes_of_a_mistral_without_yarn_go_back_and_forth(
    name: str, conversions: Written, tmp_path: Path
) -> None:
    """Its params.json says them as that of a model with yarn does."""
    source = quantise(conversions("mistral-float32"), tmp_path / "in", name)
    asked = Options(family_options={"container": "safetensors"})
    convert(source, tmp_path / "original", to="original", options=asked)
    said = json.loads((tmp_path / "original" / "params.json").read_text())["quantization"]
    assert said["qscheme_act"] == ("TENSOR" if name == "fp8-tensor" else "NO_SCALES")
    convert(tmp_path / "original", tmp_path / "again")
    assert held(tmp_path / "again") == held(source)
    assert verify(tmp_path / "again", tmp_path / "original", levels=("coverage", "bits")).status == "pass"
