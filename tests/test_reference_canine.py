"""Both readings of CANINE: the golden toy of the original code, every head and its loss against transformers,
lengths, padding, and mistakes in the parts that no other model has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

from ckpt_tool.reference import canine, hf_canine, losses
from ckpt_tool.reference.phases import leaves
from tests.test_house_reference import plant

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]
SPECIAL = 57344, 57345  # [CLS], [SEP]


# --- models -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    width: int = 24
    layers: int = 2
    heads: int = 3
    inner: int = 20
    rows: int = 37
    window: int = 12
    rate: int = 4
    taps: int = 4
    hashes: int = 8

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """In the original's names and orientation."""
        D, F = self.width, self.inner
        made: dict[str, tuple[int, ...]] = {
            f"char_embeddings/embeddings/HashBucketCodepointEmbedder_{s}": (self.rows, D // self.hashes)
            for s in range(self.hashes)
        }
        made["char_embeddings/segment_embeddings"] = (16, D)
        made["char_embeddings/char_position_embeddings"] = (self.rows, D)
        made["pooler/dense/kernel"], made["pooler/dense/bias"] = (D, D), (D,)
        down = "initial_char_encoder/initial_char_encoder/chars_to_molecules/"
        made[down + "conv/kernel"], made[down + "conv/bias"] = (self.rate, D, D), (D,)
        made["final_char_encoder/conv/kernel"] = (self.taps, 2 * D, D)
        made["final_char_encoder/conv/bias"] = (D,)
        deep = [f"bert/layer_{i}/" for i in range(self.layers)]
        layers = ["initial_char_encoder/layer_0/", *deep, "final_char_encoder/layer_0/"]
        dense = {f"attention/self/{n}/": (D, D) for n in ("query", "key", "value")}
        dense |= {"attention/output/dense/": (D, D), "intermediate/dense/": (D, F), "output/dense/": (F, D)}
        for p in layers:
            made |= {f"{p}{n}kernel": s for n, s in dense.items()}
            made |= {f"{p}{n}bias": s[1:] for n, s in dense.items()}
        norms = ["char_embeddings/", down, "final_char_encoder/"]
        norms += [f"{p}{n}" for p in layers for n in ("attention/output/", "output/")]
        made |= {f"{p}LayerNorm/{n}": (D,) for p in norms for n in ("gamma", "beta")}
        return made

    def config(self, activation: str = "gelu_new") -> dict[str, Any]:
        return {
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "hidden_act": activation,
            "max_position_embeddings": self.rows,
            "num_hash_buckets": self.rows,
            "num_hash_functions": self.hashes,
            "downsampling_rate": self.rate,
            "upsampling_kernel_size": self.taps,
            "local_transformer_stride": self.window,
        }

    def original(self) -> canine.Config:
        told = {"num_attention_heads": self.heads, "local_transformer_stride": self.window}
        return canine.Config.from_original(told, self.shapes(), 1, {})


def hf_name(name: str) -> str:
    for old, new in (
        ("char_embeddings/embeddings/", "char_embeddings/"),
        ("segment_embeddings", "token_type_embeddings"),
        ("initial_char_encoder/initial_char_encoder/", ""),
        ("bert/", "encoder/"),
        ("final_char_encoder/conv", "projection/conv"),
        ("final_char_encoder/LayerNorm", "projection/LayerNorm"),
        ("layer_", "layer/"),
        ("kernel", "weight"),
        ("gamma", "weight"),
        ("beta", "bias"),
    ):
        name = name.replace(old, new)
    table = name.startswith("char_embeddings/") and "LayerNorm" not in name
    return name.replace("/", ".") + (".weight" if table else "")


def hf_state(state: Mapping[str, Tensor]) -> State:
    return {
        hf_name(n): (t.permute(*reversed(range(t.ndim))) if n.endswith("kernel") else t).contiguous()
        for n, t in state.items()
    }


def random_state(sizes: Sizes) -> State:
    seed = torch.Generator().manual_seed(4)
    return {n: torch.randn(s, generator=seed) * 0.2 + n.endswith("gamma") for n, s in sizes.shapes().items()}


def judge(
    sizes: Sizes, state: State, architecture: str = "CanineModel", activation: str = "gelu_new", **config: Any
) -> Any:
    """The class of transformers with the tensors of the Hugging Face layout, without dropout."""
    transformers = pytest.importorskip("transformers")
    made = transformers.CanineConfig(**sizes.config(activation), **config, attn_implementation="eager")
    model = getattr(transformers, architecture)(made).eval()
    model.load_state_dict(state, strict=True)
    return model


def batch(T: int = 30, real: int = 22) -> dict[str, Tensor]:
    """Two rows of which one is padded; in windows of 12 its last one is padding alone, two places after the
    last character."""
    ids = torch.tensor(
        [[(7 + 12289 * k * k + 977 * k + row * 40000) % 1114112 for k in range(T)] for row in (0, 1)]
    )
    ids[:, 0] = SPECIAL[0]
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    ids[1, real:], mask[1, real:], types[:, T // 2 :] = 0, 0, 11
    return {"ids": ids, "mask": mask, "token_types": types}


# --- the original code ------------------------------------------------------------------------------------

TOY = Sizes(width=16, layers=2, heads=2, inner=12, rows=24, window=8)
GOLDEN = {
    "tanh": """
        0.14468 -0.52475 0.33931 1.30145  -0.77330 -0.39156 -0.68926 1.21472
        -0.38910 0.15731 0.16581 2.29461  -0.44788 -0.15424 -0.48352 1.33421
        0.80784 -0.48404 0.36109 0.83154  0.48570 -0.70799 -0.04762 0.85232  -20.0732 -11.8271""",
    "erf": """
        0.14447 -0.52454 0.33925 1.30137  -0.77335 -0.39144 -0.68898 1.21468
        -0.38912 0.15731 0.16590 2.29439  -0.44777 -0.15413 -0.48327 1.33399
        0.80780 -0.48408 0.36116 0.83156  0.48579 -0.70800 -0.04760 0.85235  -20.0745 -11.8277""",
}


def toy() -> tuple[State, dict[str, Tensor]]:
    """Two deep layers whose elements are a formula of their place, and two texts."""
    state = {}
    for k, (name, shape) in enumerate(sorted(TOY.shapes().items()), 1):
        place = torch.arange(math.prod(shape), dtype=torch.float64)
        value = 0.3 * torch.sin(0.1 * (place + 1) ** 2 + k) + name.endswith("gamma")
        state[name] = value.float().view(shape)
    ids = torch.zeros(2, 19, dtype=torch.long)
    ids[0] = torch.tensor([SPECIAL[0], *range(104, 153, 3), SPECIAL[1]])
    ids[1, :10] = torch.tensor([SPECIAL[0], 72, 128512, 1114111, *range(97, 102), SPECIAL[1]])
    types = torch.zeros_like(ids)
    types[:, 9:] = 1
    return state, {"ids": ids, "mask": (ids != 0).long(), "token_types": types}


def base(module: Any, c: Any, state: State, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = module.HEADS["base_model"](
        module.encode(**given, ranks=[state], c=c), [state], c
    )
    return found


@pytest.mark.parametrize("form", GOLDEN)
@pytest.mark.parametrize("side", ["original", "hf"])
def test_the_toy_is_that_of_the_original_code(form: str, side: str) -> None:
    """Computed by the TensorFlow code itself, with its own gelu and with that of published configs."""
    state, given = toy()
    if side == "original":
        hidden, pooled = base(canine, replace(TOY.original(), activation=form), state, given)
    else:
        config = TOY.config("gelu_new" if form == "tanh" else "gelu") | {"architectures": ["CanineModel"]}
        hidden, pooled = base(hf_canine, hf_canine.Config.from_hf(config), hf_state(state), given)
    rows = [
        hidden[0, 0, :4],
        hidden[0, 18, :4],
        hidden[1, 8, :4],
        hidden[1, 9, :4],
        pooled[0, :4],
        pooled[1, :4],
    ]
    found = torch.cat([*rows, hidden[0].sum()[None], hidden[1, :10].sum()[None]])
    wanted = torch.tensor([float(x) for x in GOLDEN[form].split()])
    assert (found - wanted)[:24].abs().max() <= 1.2e-5
    assert (found - wanted)[24:].abs().max() <= 2e-4


def test_a_window_of_padding_differs_only_where_it_is() -> None:
    """10000 less in all scores of a window is no change at all, the lowest number makes them all alike; what
    comes out differs there, and in the two places before it."""
    state, given = toy()
    ours, _ = base(canine, TOY.original(), state, given)
    config = TOY.config() | {"architectures": ["CanineModel"]}
    theirs, _ = base(hf_canine, hf_canine.Config.from_hf(config), hf_state(state), given)
    apart = (ours - theirs).abs().amax(-1)
    assert apart[0].max() < 1e-5 and apart[1, :14].max() < 1e-5
    assert apart[1, 14:].max() > 0.05


# --- transformers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    architecture: str
    name: str
    outputs: tuple[str, ...]
    stem: str = "classifier."
    labels: Callable[[], dict[str, Tensor]] = dict
    loss: Callable[..., Tensor] | None = None
    config: tuple[tuple[str, Any], ...] = ()


def classes(labels: Tensor, problem: str | None = None, count: int = 3) -> Head:
    return Head(
        "CanineForSequenceClassification",
        "sequence_classification",
        ("logits",),
        labels=lambda: {"labels": labels.clone()},
        loss=lambda logits, labels: losses.classification(logits, labels, problem),
        config=(("num_labels", count), ("problem_type", problem)),
    )


def token_labels() -> Tensor:
    found = torch.arange(60).view(2, 30) % 3
    return found.masked_fill(batch()["mask"] == 0, -100)


def question(first: int, last: int) -> Head:
    return Head(
        "CanineForQuestionAnswering",
        "question_answering",
        ("start_logits", "end_logits"),
        "qa_outputs.",
        lambda: {"start_positions": torch.tensor([3, first]), "end_positions": torch.tensor([6, last])},
        lambda start, end, start_positions, end_positions: losses.span(
            start, end, start_positions, end_positions
        ),
    )


ONE_EACH, TRUTH = torch.tensor([2, 0]), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
REAL = torch.tensor([[0.3, -1.2, 2.0], [0.1, 0.4, -0.7]])
HEADS = {
    "base": Head("CanineModel", "base_model", ("last_hidden_state", "pooler_output")),
    "classes": classes(ONE_EACH),
    "classes-told": classes(ONE_EACH, "single_label_classification"),
    "several-classes": classes(TRUTH),
    "several-classes-told": classes(TRUTH, "multi_label_classification"),
    "regression": classes(torch.tensor([0.7, -0.4]), count=1),
    "regression-of-three": classes(REAL, "regression"),
    "multiple-choice": Head(
        "CanineForMultipleChoice",
        "multiple_choice",
        ("logits",),
        labels=lambda: {"labels": torch.tensor([1, 2])},
        loss=losses.labelled,
    ),
    "token-classes": Head(
        "CanineForTokenClassification",
        "token_classification",
        ("logits",),
        labels=lambda: {"labels": token_labels()},
        loss=losses.labelled,
        config=(("num_labels", 3),),
    ),
    "question": question(25, 9),
    "question-outside": question(30, 41),  # positions from T on do not count
    "question-before": question(-4, 9),  # and those before the first are the first
}


def inputs_of(head: Head) -> dict[str, Tensor]:
    given = batch()
    if head.name == "question_answering":  # its softmax is over padding too, where the two layouts differ
        given["mask"] = torch.ones_like(given["mask"])
    if head.name == "multiple_choice":
        given = {n: torch.stack([t, t.roll(1, 1) if n == "ids" else t, t], 1) for n, t in given.items()}
        given["ids"] = given["ids"] * given["mask"]
        given["ids"][:, 2, 3] = 8364
    return given


@pytest.mark.parametrize("name", HEADS)
def test_every_head_and_its_loss_are_those_of_transformers(name: str) -> None:
    """Of both readings, at the characters that there are. Measured: at most 2.9e-6."""
    head, sizes = HEADS[name], Sizes()
    config = dict(head.config)
    count = 1 if head.name == "multiple_choice" else config.get("num_labels", 2)
    seed = torch.Generator().manual_seed(9)
    weight = torch.randn(count, sizes.width, generator=seed) * 0.3
    bias = torch.randn(count, generator=seed) * 0.3
    state = random_state(sizes)
    theirs = hf_state(state)
    if head.architecture != "CanineModel":
        theirs = {f"canine.{n}": t for n, t in theirs.items()}
        theirs |= {f"{head.stem}weight": weight, f"{head.stem}bias": bias}
    stem = "cls/tydi/output_" if head.name == "question_answering" else "output_"
    state |= {f"{stem}weights": weight, f"{stem}bias": bias}
    given = inputs_of(head)
    model = judge(sizes, theirs, head.architecture, **config)
    with torch.no_grad():
        wanted = model(
            input_ids=given["ids"],
            attention_mask=given["mask"],
            token_type_ids=given["token_types"],
            **head.labels(),
        )
    c = hf_canine.Config.from_hf(sizes.config() | {"architectures": [head.architecture]})
    for module, own, numbers in ((canine, state, sizes.original()), (hf_canine, theirs, c)):
        made = module.HEADS[head.name](module.encode(**given, ranks=[own], c=numbers), [own], numbers)
        outputs = made if isinstance(made, tuple) else (made,)
        for output, field in zip(outputs, head.outputs, strict=True):
            kept = given["mask"].bool() if wanted[field].shape[:2] == (2, 30) else ...
            assert output.shape == wanted[field].shape
            assert (output[kept] - wanted[field][kept]).abs().max() <= 1e-5
        if head.loss is not None:
            assert abs(head.loss(*outputs, **head.labels()) - wanted.loss) <= 1e-5


OTHERS = {
    "sixteen-tables": Sizes(width=48, hashes=16),
    "one-table": Sizes(hashes=1, rows=1009),
    "rate-3-taps-5": Sizes(rate=3, taps=5, window=9),
    "rate-2-taps-1": Sizes(rate=2, taps=1, window=10),
    "taps-6-window-1": Sizes(taps=6, window=1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sizes_are_computed_as_transformers_does(name: str) -> None:
    sizes = OTHERS[name]
    state, given = random_state(sizes), batch(23, 23)
    with torch.no_grad():
        found = judge(sizes, hf_state(state))(given["ids"], given["mask"], given["token_types"])
    c = hf_canine.Config.from_hf(sizes.config() | {"architectures": ["CanineModel"]})
    for made in (base(canine, sizes.original(), state, given), base(hf_canine, c, hf_state(state), given)):
        for output, wanted in zip(made, (found.last_hidden_state, found.pooler_output), strict=True):
            assert (output - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("T", [4, 5, 6, 7, 8, 11, 12, 13, 37])
def test_any_length_from_one_molecule_on(T: int) -> None:
    """With a single molecule there is the first character and nothing else in the deep stack."""
    sizes = Sizes()
    state, ids = random_state(sizes), batch(37, 37)["ids"][:, :T]
    with torch.no_grad():
        found = judge(sizes, hf_state(state))(ids, torch.ones_like(ids))
    c = hf_canine.Config.from_hf(sizes.config() | {"architectures": ["CanineModel"]})
    for made in (
        base(canine, sizes.original(), state, {"ids": ids}),
        base(hf_canine, c, hf_state(state), {"ids": ids}),
    ):
        assert (made[0] - found.last_hidden_state).abs().max() <= 1e-5
        assert (made[1] - found.pooler_output).abs().max() <= 1e-5


def test_lengths_that_a_pass_takes() -> None:
    sizes = Sizes()
    ours, theirs = sizes.original(), hf_canine.Config.from_hf(sizes.config())
    for module, c in ((canine, ours), (hf_canine, theirs)):
        assert [module.fits(n, c) for n in (0, 3, 4, 36, 37, 512)] == [0, 0, 4, 36, 37, 37]
        # the last window starts at 24: two places before it are to be free, or it is not there
        assert [module.padding(n, 30, c) for n in (22, 23, 24, 25, 30)] == [22, 22, 22, 25, 30]
        assert [module.padding(n, 24, c) for n in (10, 11, 12)] == [10, 10, 10]
    with pytest.raises(ValueError, match="expected at least 4 characters, found 3"):
        base(canine, ours, random_state(sizes), {"ids": torch.tensor([[1, 2, 3]])})
    with pytest.raises(ValueError, match="expected at least 4 characters, found 3"):
        bare = replace(theirs, root="")
        base(hf_canine, bare, hf_state(random_state(sizes)), {"ids": torch.tensor([[1, 2, 3]])})


def test_padding_as_it_is_advised_keeps_the_layouts_together() -> None:
    """Where a window cuts a molecule in two, its rate counts too."""
    sizes = Sizes(window=10)
    state = random_state(sizes)
    theirs = hf_canine.Config.from_hf(sizes.config() | {"architectures": ["CanineModel"]})
    apart = {}
    for real in range(5, 31):
        given = batch(30, real)
        (ours, _), (other, _) = (
            base(canine, sizes.original(), state, given),
            base(hf_canine, theirs, hf_state(state), given),
        )
        apart[real] = float((ours - other)[given["mask"].bool()].abs().max())
    assert {n for n, d in apart.items() if d > 1e-5} == {
        n for n in apart if canine.padding(n, 30, sizes.original()) != n
    }


def test_the_other_gelu_stays_within_its_bounds() -> None:
    """In every phase, of which each is given the same; most use a good part of their bound."""
    sizes, given = Sizes(), batch()
    state = hf_state(random_state(sizes))
    both = [
        hf_canine.Config.from_hf(sizes.config(act) | {"architectures": ["CanineModel"]})
        for act in ("gelu", "gelu_new")
    ]
    ids, inputs = given["ids"], {n: t for n, t in given.items() if n != "ids"}
    x, used = ids, {}
    for erf, tanh in zip(*(hf_canine.phases([state], c, inputs) for c in both), strict=True):
        if erf.kind == "head":
            continue
        found, wanted = erf.run(x), tanh.run(x)
        name = "layer" if erf.index is not None else erf.name
        if name == "embed":
            assert torch.equal(found, wanted)
        else:
            bound_of = hf_canine.bounds[name]
            more = (erf.index,) if name == "layer" else ()
            told = {"mask": given["mask"]} if "mask" in signature(bound_of).parameters else {}
            bound = bound_of(x, *more, [state], both[0], **told)
            shares = []
            for a, b, most in zip(leaves(found), leaves(wanted), leaves(bound), strict=True):
                assert ((a - b).abs() <= most + 1e-6).all(), erf.name
                shares.append(float(((a - b).abs().max()) / most.max().clamp(min=1e-9)))
            used[erf.name] = max(shares)
        x = wanted
    assert len(used) == sizes.layers + 4 and all(0.01 < share < 1 for share in used.values()), used


# --- what does not fit ------------------------------------------------------------------------------------


def told(**settings: Any) -> dict[str, Any]:
    return {"num_attention_heads": 3, "local_transformer_stride": 12, **settings}


REFUSED = {
    "layers": (told(num_hidden_layers=3), {}, "expected num_hidden_layers 3, as told, found 2"),
    "positions": (told(), {"max_position_embeddings": 38}, "max_position_embeddings 38, as told, found 37"),
    "gelu": (told(hidden_act="tanh"), {}, "expected `hidden_act` to be one of gelu, relu, found tanh"),
    "heads": (told(num_attention_heads=5), {}, "expected heads that 24 channels can share, found 5"),
    "unknown": (told(local_attention_window=3), {}, "found `local_attention_window` 3"),
    "nothing": ({}, {}, "expected `num_attention_heads` in the settings or given by name, found neither; "
                        "expected `local_transformer_stride`"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_fit_are_refused(name: str) -> None:
    params, overrides, said = REFUSED[name]
    with pytest.raises(ValueError, match=said.replace("`", ".")):
        canine.Config.from_original(params, Sizes().shapes(), 1, overrides)


def test_what_the_code_does_not_read_is_not_read() -> None:
    """It has 16 token types and one width of the first convolution, whatever its settings say."""
    idle = told(
        type_vocab_size=2, downsampling_kernel_size=7, hidden_dropout_prob=0.1, __comment__="of a run"
    )
    assert (
        canine.Config.from_original(idle, Sizes().shapes(), 1, {"hidden_act": "gelu"}) == Sizes().original()
    )
    published = Sizes(width=768, layers=12, heads=12, inner=3072, rows=16384, window=128)
    found = canine.Config.from_original({}, published.shapes(), 1, {})
    assert (found.n_heads, found.window, found.activation) == (12, 128, "tanh")


# --- mistakes ---------------------------------------------------------------------------------------------

MUTANTS = {
    "hash of the code point": (("canine.hashed", "+ 1)", ")"), ("hf_canine.embed", " + 1)", ")")),
    "hash by the next prime": (
        ("canine.embed", "PRIMES, strict", "PRIMES[1:], strict"),
        ("hf_canine.embed", "PRIMES[: c.n_hashes]", "PRIMES[1 : c.n_hashes + 1]"),
    ),
    "positions from 1": (
        ("canine.embed", "[: ids.shape[1]]", "[1 : ids.shape[1] + 1]"),
        ("hf_canine.embed", "torch.arange(ids", "1 + torch.arange(ids"),
    ),
    "windows one wider": (
        ("canine.initial", "torch.split(x, c.window, 1), torch.split(seen, c.window, 1)",
         "torch.split(x, c.window + 1, 1), torch.split(seen, c.window + 1, 1)"),
        ("hf_canine.local_attention", "    B, T, D = x.shape",
         "    from dataclasses import replace\n    c = replace(c, window=c.window + 1)\n    B, T, D = "
         "x.shape"),
    ),
    "padding seen": (
        ("canine.attention", "* UNSEEN", "* 0"),
        ("hf_canine.self_attention", "keys == 0", "keys < -1"),
    ),
    "no molecule dropped": (
        ("canine.to_molecules", "[x[:, :1], made[:, :-1]]", "[made]"),
        ("hf_canine.downsampled", "x[:, :1], activate(made, c.activation)[:, :-1]",
         "activate(made, c.activation)"),
    ),
    "first character through the convolution": (
        ("canine.to_molecules", "x[:, :1]", "made[:, :1]"),
        ("hf_canine.downsampled", "torch.cat([x[:, :1]", "torch.cat([activate(made, c.activation)[:, :1]"),
    ),
    "convolution without its gelu": (
        ("canine.to_molecules", "activate(convolution(x, w, DOWN + \"conv/\", c.rate), c.activation)",
         "convolution(x, w, DOWN + \"conv/\", c.rate)"),
        ("hf_canine.downsampled", "activate(made, c.activation)", "made"),
    ),
    "mask of molecules by the last character": (
        ("canine.deep_layer", "amax(-1)", "select(-1, -1)"),
        ("hf_canine.molecules_seen", "F.max_pool1d(wide(mask)[:, None], c.rate)[:, 0]",
         "wide(mask)[:, c.rate - 1 :: c.rate]"),
    ),
    "molecules repeated one place late": (
        ("canine.repeated", "torch.arange(T, device=m.device) //",
         "(torch.arange(T, device=m.device) - 1).clamp(min=0) //"),
        ("hf_canine.upsampled", "m.repeat_interleave(lengths, dim=1)",
         "m.repeat_interleave(lengths, dim=1)[:, [0, *range(characters.shape[1] - 1)]]"),
    ),
    "first molecule repeated too": (
        ("canine.repeated", "// rate + 1", "// rate"),
        ("hf_canine.upsampled", "lengths[0] = 0", "lengths[0] = c.rate"),
    ),
    "padded on the other side": (
        ("canine.projection", "before, both, after", "after, both, before"),
        ("hf_canine.upsampled", "(before, c.kernel - 1 - before)", "(c.kernel - 1 - before, before)"),
    ),
    "molecules before characters": (
        ("canine.projection", "[characters, repeated(m, characters.shape[1], c.rate)]",
         "[repeated(m, characters.shape[1], c.rate), characters]"),
        ("hf_canine.upsampled", "[characters, repeated]", "[repeated, characters]"),
    ),
    "taps the other way": (
        ("canine.convolution", "enumerate(kernel)", "enumerate(kernel.flip(0))"),
        ("hf_canine.upsampled", 'w[p + "conv.weight"]', 'w[p + "conv.weight"].flip(-1)'),
    ),
    "pooled from the last molecule": (
        ("canine.pool", "0, :]", "-1, :]"),
        ("hf_canine.pool", "0, :]", "-1, :]"),
    ),
    "no norm after the attention's sum": (
        ("canine.layer", "+ a, w, p + \"output/LayerNorm/\")", ", w, p + \"output/LayerNorm/\")"),
        ("hf_canine.bert_layer", "p + \"output.dense.\") + y", "p + \"output.dense.\")"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_in_a_part_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On either side by parity, and by transformers on both."""
    sizes, given = Sizes(), batch()
    state = random_state(sizes)
    c = hf_canine.Config.from_hf(sizes.config() | {"architectures": ["CanineModel"]})
    sides = ((canine, sizes.original(), state), (hf_canine, c, hf_state(state)))
    with torch.no_grad():
        out = judge(sizes, hf_state(state))(given["ids"], given["mask"], given["token_types"])
    real = given["mask"].bool()

    def off(side: tuple[Any, Any, State]) -> float:
        hidden, pooled = base(*side, given)
        apart = [(hidden - out.last_hidden_state)[real], pooled - out.pooler_output]
        return max(float(x.abs().max()) for x in apart)

    assert all(off(side) <= 1e-5 for side in sides)
    for edit, side in zip(MUTANTS[name], sides, strict=True):
        with monkeypatch.context() as planted:
            plant(planted, edit)
            assert off(side) > 1e-3
    assert all(off(side) <= 1e-5 for side in sides)


def test_known_mistakes_are_seen_and_taken_back() -> None:
    sizes = OTHERS["sixteen-tables"]
    given, state = batch(), hf_state(random_state(sizes))
    config = sizes.config() | {"architectures": ["CanineModel"]}
    c = hf_canine.Config.from_hf(config)
    right = base(hf_canine, c, state, given)
    found = hf_canine.mistakes(list(state), c)
    assert len(found) == 13 and "tables of hashes in the order of their names" in found
    for name, (make, back) in found.items():
        wrong = state | make(state)
        assert (
            max(
                float((a - b).abs().max())
                for a, b in zip(base(hf_canine, c, wrong, given), right, strict=True)
            )
            > 1e-3
        ), name
        healed = wrong | back(wrong)
        assert all(torch.equal(healed[n], state[n]) for n in state), name
    assert hf_canine.mistakes(["pooler.dense.weight"], c) == {}
    for name, values in hf_canine.config_mistakes(config).items():
        other = base(hf_canine, hf_canine.Config.from_hf(config | values), state, given)
        assert (other[0] - right[0]).abs().max() > 1e-3, name
