"""What a file or a folder is that holds no checkpoint of a kind read here: signs as data, each with what it
is and what to do about it. Names and first bytes tell; nothing else of a file is looked at.

Sources: the writers' own documentation and code: PEFT, accelerate (merge-weights), DeepSpeed
(zero_to_fp32.py), torch (distributed.checkpoint.format_utils), Megatron-LM (--ckpt-convert-format), NeMo
(checkpoint_converters, llm.export_ckpt), transformers 4 (from_tf, from_flax), mlx_lm.convert, aria2.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache

from ckpt_tool.errors import printable
from ckpt_tool.records import dataclass

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before 1.6
TAR_BLOCK = 512
GZIP = b"\x1f\x8b"
RELEASE = "get the release that it was made from, as safetensors or as torch files, and give that folder"


@dataclass(frozen=True)
class Sign:
    """`paths` are the last parts of a path that tell, `beside` other paths of which one must be there too and
    `without` some of which none may be, `starts` first bytes (with their place) of a file. In `hint`, {at} is
    the folder in which `paths` was found, or the group `at` of it; `inner` says that the weights in its own
    folders are of use."""

    what: str
    hint: str
    paths: str | None = None
    starts: tuple[tuple[int, bytes], ...] = ()
    beside: str | None = None
    without: str | None = None
    inner: bool = False

    def tells(self, path: str) -> bool:
        return _found(self.paths, path) is not None

    def place(self, path: str) -> str:
        """The part of `path`, which tells, that {at} stands for."""
        found = _found(self.paths, path)
        if found is None:
            return path
        named = "at" in found.re.groupindex and found["at"] is not None
        return path[: found.end("at") if named else found.start()].rstrip("/")


def _found(pattern: str | None, path: str) -> re.Match[str] | None:
    return None if pattern is None else _compiled(pattern).search(path)


@cache  # when the first is asked for: to compile them all takes 8 ms of every start
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|/)(?:{pattern})$", re.ASCII)


def _sign(
    what: str,
    hint: str,
    paths: str = "",
    *starts: tuple[int, bytes],
    beside: str = "",
    without: str = "",
    inner: bool = False,
) -> Sign:
    return Sign(what, hint, paths or None, starts, beside or None, without or None, inner)


DOWNLOAD = "the download failed or needs a login; download the file again"
POINTERS = (
    _sign(
        "a git-lfs pointer, not the file it stands for",
        "run `git lfs pull` where the repository was cloned",
        "",
        (0, b"version https://git-lfs.github.com/spec/"),
    ),
    _sign(
        "a Xet pointer, not the file it stands for",
        "download the file itself, with huggingface_hub or git-xet",
        "",
        (0, b"# xet version"),
    ),
)
# What servers send in place of a file, as the Hub, its mirrors and storages word it.
_SERVER = re.compile(
    rb"\s*(\d{3}:? )?((entry|repository|revision) not found|not found\s*$|invalid (rev|username|credentials)"
    rb"|access (to model|denied)|cannot access gated|unauthorized|forbidden|too many requests"
    rb"|you (must|need to) (be authenticated|log ?in))|\s*\{\s*\"(error|detail)\"\s*:\s*\"[^\"]*\"\s*\}\s*$",
    re.IGNORECASE,
)
_PAGE = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error")
SERVER_BYTES = 4096  # no message is longer
PAGE = _sign("a web page", DOWNLOAD)
SQUEEZED = _sign("a gzip file", "unpack it: gunzip makes the file of it")
# A bundle with its index and data files is read; these are what is left where a part of it is not there.
_BESIDE_IT = "download the files beside it too: PREFIX.index and PREFIX.data-00000-of-00001 belong together"
TENSORFLOW = (
    _sign(
        "a TensorFlow SavedModel",
        "TensorFlow 1 exported variables under their names: put the documents (bert_config.json, vocab.txt)"
        " into {at}/variables, which is read as it is, and give that; TensorFlow 2 names them after objects"
        f" of a program, and no family is read from it: {RELEASE}",
        r"saved_model\.pb(txt)?",
    ),
    _sign("the index of a TensorFlow checkpoint without its data files", _BESIDE_IT, r"[^/]+\.index"),
    _sign(
        "data files of a TensorFlow checkpoint without its index", _BESIDE_IT, r"[^/]+\.data-\d{5}-of-\d{5}"
    ),
    _sign(
        "the graph of a TensorFlow checkpoint without its weights", _BESIDE_IT, r"[^/]*\.ckpt(-\d+)?\.meta"
    ),
    _sign("a TensorFlow graph", f"no family is read from it; {RELEASE}", r"[^/]*\.pb"),
)
# What ends like an index of TensorFlow and is none: the whole checkpoint, as it was written before 2017.
V1 = _sign(
    "a TensorFlow V1 checkpoint (one file, as before 2017)",
    "TensorFlow writes it anew: r = tf.train.load_checkpoint(FILE); n = [*r.get_variable_to_shape_map()];"
    ' tf.raw_ops.SaveV2(prefix=OUT, tensor_names=n, shape_and_slices=[""] * len(n),'
    " tensors=[r.get_tensor(k) for k in n]); then give OUT.index",
)
RENAMED_INDEX = _sign(
    "the index of a TensorFlow checkpoint",
    "call it PREFIX.index again, beside PREFIX.data-00000-of-00001, and give that",
)
TABLE_END = bytes.fromhex("57fb808b247547db")  # of the tables in which TensorFlow lists tensors
SIGNS = (
    *POINTERS,
    # --- adapters ---
    _sign(
        "an adapter (PEFT, LoRA) and not a model",
        "merge it into its model: PeftModel.from_pretrained(MODEL, {at}).merge_and_unload()"
        ".save_pretrained(OUT); then give OUT",
        r"adapter_config\.json|adapter_model\.(safetensors|bin)|adapter_\d+\.(pt|safetensors)",
    ),
    # --- training programs ---
    _sign(
        "shards of FSDP that verl wrote, one for each rank",
        "verl joins them: `python -m verl.model_merger merge --backend fsdp --local_dir {at} --target_dir"
        " OUT`; then give OUT",
        r"model_world_size_\d+_rank_\d+\.pt",
    ),
    _sign(
        "shards of NeuronX Distributed, one for each rank",
        "convert_checkpoints.py of NeuronX Distributed's examples joins them (--convert_to_full_state); then"
        " give the file that it writes",
        r"(dp_rank_\d+_)?tp_rank_\d+_pp_rank_\d+(_dp_rank_\d+)?(\.pt)?",
    ),
    _sign(
        "a NeMo checkpoint in zarr format",
        "NeMo's scripts/checkpoint_converters/convert_zarr_to_torch_dist.py writes it anew; then give that",
        r"(model_weights|weights)/[^/]*/\.zarray",
    ),
    _sign(
        "a torch.distributed checkpoint (.distcp) without its .metadata, a hidden file",
        "copy .metadata from where it was saved into {at} (`cp *` leaves it out), and give this again",
        r"[^/]*\.distcp",
        without=r"\.metadata",
    ),
    _sign(
        "the list of a torch.distributed checkpoint (.metadata) without its data (.distcp)",
        "copy the files of all ranks, *.distcp, into {at}, and give this again",
        r"\.metadata",
        without=r"[^/]*\.distcp",
    ),
    _sign(
        "a NeMo 2 checkpoint whose weights are in no format that is read",
        "NeMo writes it for Hugging Face: llm.export_ckpt(path={at}, target='hf', output_path=OUT)",
        r"context/(io\.json|model\.yaml)",
        beside=r"weights/[^/]*",
    ),
    _sign("a NeMo archive", "give the archive itself: {at}", r"(?P<at>[^/]*\.nemo)"),
    _sign(
        "a quantised NeMo archive (.qnemo), as TensorRT-LLM reads it",
        RELEASE,
        r"[^/]*\.qnemo",
    ),
    _sign(
        "a NeMo model without weights that are read",
        "NeMo's scripts/checkpoint_converters/convert_*_nemo_to_hf.py writes it for Hugging Face",
        r"model_config\.yaml",
        beside=r"[^/]*\.(ckpt|pt|bin|distcp)",
    ),
    _sign(
        "a Megatron checkpoint in torch_dist format (torch.distributed, .distcp)",
        "Megatron's training script writes it anew: --load {at} --ckpt-convert-format torch"
        " --ckpt-convert-save OUT (or save with --ckpt-format torch)",
        r"(iter_\d{7,}|release)/([^/]*\.distcp|common\.pt|metadata\.json)|common\.pt|metadata\.json",
        beside=r"[^/]*\.distcp",
    ),
    _sign(
        "a Megatron checkpoint in zarr format",
        "Megatron's training script writes it anew: --load {at} --ckpt-convert-format torch"
        " --ckpt-convert-save OUT",
        r"(iter_\d{7,}|release)/[^/]*/\.zarray",
    ),
    _sign(
        "a torch.distributed checkpoint of sharded FSDP weights (.distcp)",
        "accelerate joins it: `accelerate merge-weights {at} OUT`; put config.json into OUT and give that",
        r"(?P<at>pytorch_model_fsdp_\d+)/(\.metadata|[^/]*\.distcp)",
    ),
    _sign(
        "the state of an optimizer alone (.distcp)",
        "give the folder of the weights, which trainers put beside it: pytorch_model_fsdp_0 or model, say",
        r"optim(izer(_\d+)?)?/(\.metadata|[^/]*\.distcp)",
    ),
    _sign(
        "a torch.distributed checkpoint (.distcp)",
        "torch joins it: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch {at} OUT.pt`;"
        " then give OUT.pt",
        r"\.metadata",
        beside=r"[^/]*\.distcp",
    ),
    _sign(
        "layers of a DeepSpeed pipeline, or experts, each in a file of its own",
        "the program that trained it knows which is which: save the whole model with it (GPT-NeoX:"
        " tools/ckpts/convert_neox_to_hf.py)",
        r"(global_step\d+/)?((layer_\d+-model_\d+-|(layer_\d+_)?expert_\d+_mp_rank_\d+_)model_states"
        r"|(zero_)?expp_rank_\d+_mp_rank_\d+_optim_states)\.pt",
    ),
    _sign(
        "a universal checkpoint of DeepSpeed, each parameter in a folder of its own",
        "only training reads those: the folder that ds_to_universal.py made it from has the weights; put"
        " config.json or params.json beside it and give that",
        r"zero/[^/]+/(fp32|exp_avg|exp_avg_sq)\.pt",
    ),
    _sign(
        "a DeepSpeed checkpoint (ZeRO) that is not whole",
        "files *_model_states.pt and *_optim_states.pt of all ranks are read together: give the folder that"
        " has all of them, with config.json or params.json in it or around it",
        r"(global_step\d+/)?((bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(optim|model)_states\.pt"
        r"|mp_rank_\d+_model_states\.pt)|zero_to_fp32\.py",
    ),
    # --- other libraries ---
    _sign(
        "a torch file that was unpacked, as some download programs do by themselves",
        "pack its folder {at} again, without compressing it: `zip -0 -r OUT.zip` and the name of that folder,"
        " called beside it; then give OUT.zip the name that the file had",
        r"(?P<at>[^/]+)/data\.pkl",
        beside=r"[^/]+/version",
    ),
    _sign(
        "one part of a file that was split",
        "join the parts in their order: `cat {at}[._-]* > WHOLE`; then give WHOLE the name that the file had",
        r"(?P<at>[^/]+\.(safetensors|pth|pt|bin|ckpt|tar|tgz|gz|zip|nemo))"
        r"(\.part[._-]?([a-z]{2}|\d{1,5})|[._-](a[a-z]|0\d{1,2}))",
    ),
    _sign(
        "a gzip file of weights",
        "unpack it: `gunzip {at}`",
        r"(?P<at>[^/]+\.(safetensors|pth|pt|bin|ckpt)\.gz)",
    ),
    _sign(
        "gpt-oss for Apple's Metal",
        f"its weights are packed for that; {RELEASE} (original/ in OpenAI's repository)",
        r"metal/model\.bin",
        (0, b"GPT-OSS v1.0"),
    ),
    _sign(
        "weights as EasyLM streams them (JAX)",
        "EasyLM writes them for Hugging Face: `python -m EasyLM.models.llama.convert_easylm_to_hf`; then give"
        " that",
        r"streaming_(params|train_state)[\w.-]*",
    ),
    _sign(
        "OPT as numpy arrays, one for each tensor (FlexGen, Alpa)",
        f"no family is read from those; {RELEASE}",
        r"decoder\.layers\.\d+\.[\w.]+\.(weight|bias)",
    ),
    _sign(
        "a GGUF file (llama.cpp)",
        f"its weights are packed for llama.cpp; {RELEASE}",
        r"[^/]*\.gguf(\.part\d+of\d+)?",
        (0, b"GGUF"),
    ),
    _sign(
        "the store of Ollama, which keeps GGUF files",
        f"its weights are packed for llama.cpp; {RELEASE}",
        r"blobs/sha256[-:][0-9a-f]{4,64}",
    ),
    _sign(
        "a llamafile (llama.cpp and its weights in one program)",
        f"its weights are packed for llama.cpp; {RELEASE}",
        r"[^/]*\.llamafile",
        (0, b"MZqFpD"),
    ),
    _sign(
        "a GGML file (llama.cpp)",
        f"its weights are packed for llama.cpp; {RELEASE}",
        r"ggml-model[^/]*\.bin",
        (0, b"lmgg"),
        (0, b"tjgg"),
        (0, b"fmgg"),
    ),
    _sign(
        "a TensorFlow model in Keras format",
        "transformers 4 reads it: from_pretrained({at}, from_tf=True).save_pretrained(OUT); then give OUT",
        r"tf_model(-\d+-of-\d+)?\.h5",
    ),
    _sign(
        "an HDF5 file (Keras)",
        f"no family is read from Keras; {RELEASE}",
        r"[^/]*\.(h5|hdf5|keras)",
        (0, b"\x89HDF\r\n\x1a\n"),
    ),
    *TENSORFLOW,
    _sign(
        "a Flax model",
        "transformers 4 reads it: from_pretrained({at}, from_flax=True).save_pretrained(OUT); then give OUT",
        r"flax_model(-\d+-of-\d+)?\.msgpack",
    ),
    _sign(
        "a JAX checkpoint (Orbax, Flax)",
        f"no family is read from JAX; {RELEASE}",
        r"_CHECKPOINT_METADATA|manifest\.ocdbt|_METADATA|[^/]*\.msgpack|target\.[^/]*/\.zarray",
    ),
    _sign("an ONNX model", f"it holds a graph of operations; {RELEASE}", r"[^/]*\.onnx(_data|\.data)?"),
    _sign(
        "numpy arrays (.npz), as MLX keeps weights",
        f"no family is read from .npz; {RELEASE}",
        r"[^/]*\.npz",
    ),
    _sign("a numpy array (.npy)", RELEASE, r"[^/]*\.npy", (0, b"\x93NUMPY")),
    _sign(
        "a TensorRT engine",
        f"it holds a compiled program; {RELEASE}",
        r"[^/]*\.(engine|plan|trt)",
        (0, b"ftrt"),
    ),
    _sign(
        "a TensorRT-LLM checkpoint",
        RELEASE,
        r"rank\d+\.safetensors",
        beside=r"config\.json",
    ),
    _sign("an OpenVINO model", RELEASE, r"openvino_[^/]*\.(xml|bin)"),
    _sign("a CoreML model", RELEASE, r"[^/]*\.(mlmodel|mlpackage/Manifest\.json|mlmodelc/[^/]*)"),
    _sign("an ExecuTorch program", RELEASE, r"[^/]*\.pte", (4, b"ET12")),
    _sign("a TensorFlow Lite model", RELEASE, r"[^/]*\.tflite", (4, b"TFL3")),
    _sign("a CTranslate2 model", RELEASE, r"model\.bin", beside=r"(shared_)?vocabulary\.(json|txt)"),
    _sign("Rust weights (.ot)", RELEASE, r"rust_model\.ot"),
    _sign(
        "a diffusers pipeline",
        "it is made of several models, each in a folder of its own",
        r"model_index\.json",
        inner=True,
    ),
    _sign(
        "a sentence-transformers model",
        "its transformer is in a folder of its own",
        r"modules\.json",
        inner=True,
    ),
    # --- other files ---
    _sign("a bzip2 archive", "unpack it, and give the folder", "", (0, b"BZh")),
    _sign("an xz archive", "unpack it, and give the folder", "", (0, b"\xfd7zXZ\0")),
    _sign("a zstandard archive", "unpack it, and give the folder", "", (0, b"\x28\xb5\x2f\xfd")),
    _sign("a 7z archive", "unpack it, and give the folder", "", (0, b"7z\xbc\xaf\x27\x1c")),
    _sign("a RAR archive", "unpack it, and give the folder", "", (0, b"Rar!")),
    _sign("a PDF document", "give the folder or the file of the weights", "", (0, b"%PDF-")),
    _sign("a program", "give the folder or the file of the weights", "", (0, b"\x7fELF")),
)

# What download programs call a file, or leave beside it, until all of it is there.
_UNFINISHED = re.compile(
    r"(?P<name>.+?)(\.aria2|\.incomplete|\.part|\.crdownload|\.download|\.!qB|\.filepart|\.partial)", re.ASCII
)


def by_start(head: bytes) -> Sign | None:
    """What a file is that starts with `head`."""
    for sign in SIGNS:
        if any(head[place : place + len(magic)] == magic for place, magic in sign.starts):
            return sign
    return None


def table_of(head: bytes) -> Sign:
    """What a table of TensorFlow is that starts with `head`. Its first key is empty, and the value under it a
    message: of a checkpoint before 2017, one whose first field is the list of tensors."""
    value = head[2:].lstrip(bytes(range(0x80, 0x100)))[1:]  # after its length, of 7 bits a byte
    return V1 if head[:2] == b"\0\0" and value[:1] == b"\x0a" else RENAMED_INDEX


def pointer(data: bytes) -> Sign | None:
    """What a file that starts with `data` only stands for, as a clone without its large files has them."""
    found = by_start(data[:64])
    return found if found in POINTERS else None


def stand_in(data: bytes, name: str) -> Sign | None:
    """What a document called `name` is that only stands for one: a pointer, as a clone without its large
    files has them, what a server sent in its place, or what it was packed into."""
    if (found := pointer(data)) is not None:
        return found
    if data.startswith(GZIP):
        return SQUEEZED
    return of_server(data) if name.endswith(".json") else None  # other texts may begin with any word


def of_server(data: bytes) -> Sign | None:
    """What a server sent in place of a file: `data` is its begin, or all of it."""
    if data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower().startswith(_PAGE):
        return PAGE
    if len(data) > SERVER_BYTES or not _SERVER.match(data):
        return None
    text = data.decode("utf-8", "replace").strip()
    return _sign(f"a message of a server ({'JSON ' * text.startswith('{')}`{printable(text, 60)}`)", DOWNLOAD)


def by_name(name: str) -> Sign | None:
    """What a file of this name is as a rule."""
    return next((s for s in SIGNS if s.beside is None and s.tells(name)), None)


def of_folder(paths: Collection[str]) -> tuple[Sign, str] | None:
    """What a folder with the files `paths` is, and the first file that tells."""
    for sign in SIGNS:
        telling = [p for p in paths if sign.tells(p)]
        beside = sign.beside is None or any(_found(sign.beside, p) for p in paths)
        if telling and beside and not any(_found(sign.without, p) for p in paths):
            return sign, min(telling, key=lambda p: (p.count("/"), p))
    return None


_TEMPORARY = "._____temp"  # where ModelScope keeps what it has not all of


def unfinished(name: str) -> str | None:
    """The file whose download is not finished while there is one called `name`."""
    *folders, last = name.split("/")
    if _TEMPORARY in folders:
        return last
    found = _UNFINISHED.fullmatch(name)
    return None if found is None else found["name"]


# --- packed weights -------------------------------------------------------------------------------------

UNPACKED = "get the release in 16 or 32 bits that it was made from, and give that folder"
MERGE = "merge them into the model first (peft: merge_and_unload), or give the model without them"
UNQUANTISED = "`mlx_lm.convert --hf-path IN --mlx-path OUT --dequantize` writes plain weights"
# The last parts of a tensor's name -> what packs tensors like that, what to do.
_PACKED = (
    (
        r"lora_(a|b|e|ranknum|embedding_a|embedding_b|magnitude_vector)(\.[\w-]+)?(\.weight)?"
        r"|adaptor\.[ab]\.weight",  # of Meta's own Llama 3.2
        "LoRA factors",
        MERGE,
    ),
    (
        r"base_layer\.(weight|bias)",
        "weights below the base_layer of an adapter whose factors are not there",
        "merged or not, nothing tells: peft's merge_and_unload, then save_pretrained, writes plain names",
    ),
    (
        r"modules_to_save(\.[\w-]+)*\.(weight|bias)",
        "modules that an adapter trained beside those they stand for (modules_to_save, original_module)",
        MERGE,
    ),
    (
        r"(ia3_l|hada_[wt]\d\w*|lokr_[wt]\d\w*|b?oft_[rs]|vera_(a|b|lambda_[bd]))(\.[\w-]+)?",
        "factors of an adapter (IA3, LoHa, LoKr, OFT, VeRA)",
        MERGE,
    ),
    (
        r"(\w*adapter\w*)\.linear_(in|out)(\.weight)?",
        "LoRA factors of NeMo",
        "NeMo merges them into the model first: scripts/nlp_language_modeling/merge_lora_weights/merge.py,"
        " or llm.peft.merge_lora of NeMo 2",
    ),
    (r"(forward|backward)_hadamard_matrix", "weights of four bits (FP-Quant)", UNPACKED),
    (r"qzeros|g_idx|qweight", "GPTQ or AWQ weights of few bits", UNPACKED),
    (r"weight\.(absmax|quant_map|nested_absmax)|scb", "bitsandbytes weights of few bits", UNPACKED),
    (
        r"_weight_(qdata|scale|zero_point)|weight:_?(data|qdata|scale)",
        "weights of few bits (torchao)",
        UNPACKED,
    ),
    (r"weight\._(data|scale|shift)", "weights of few bits (quanto)", UNPACKED),
    (r"weight_scales", "weights of few bits (EETQ)", UNPACKED),
    (r"weight_packed", "weights of few bits (compressed-tensors)", UNPACKED),
    (
        r"weight_scale(_inv|_2)?|(qscale|input_scale)\w*",
        "weights of 8 bits or fewer with scales (fp8 and others)",
        UNPACKED,
    ),
    (r"\w+_blocks|\w+\.blocks", "MXFP4 weights of four bits", UNPACKED),
    (r"codebooks|qidxs\w*", "weights of few bits (AQLM, QuIP)", UNPACKED),
    (r"w_q", "weights of few bits (HQQ)", UNPACKED),
    (r"q_weight|q_scale_max|q_invperm", "weights of few bits (ExLlama 2)", UNPACKED),
    (r"trellis|s[uv]h", "weights of few bits (ExLlama 3)", UNPACKED),
    (r"(res_|outlier_)?centroids(\.weight)?", "weights of few bits (VPTQ)", UNPACKED),
    (r"\w+_proj\.b", "weights of four bits (Marlin)", UNPACKED),
)
# Names by which another program's layout is known, whose tensors no family reads: what it is, what to do.
_LAYOUTS = (
    (
        r"(.+\.)?transformer\.h\.\d+\.(attn\.(attn|qkv)|norm_1)\.(weight|bias)",
        "LitGPT's own names",
        "`litgpt convert_from_litgpt FOLDER OUT` writes model.pth with those of Hugging Face; put config.json"
        " beside it and give it",
    ),
    (
        r"(.+\.)?layers\.\d+\.(sa_norm\.scale|mlp_norm\.scale|attn\.output_proj\.weight)",
        "torchtune's own names",
        "save it with FullModelMetaCheckpointer or FullModelHFCheckpointer, which write Meta's or Hugging"
        " Face's",
    ),
    (
        r"(.+\.)?(encoder|transformer)\.layers\.\d+\.self_attention\.key_value\.weight",
        "Megatron-DeepSpeed's own names, with queries apart from keys and values",
        "its tools/hf2megads_weight_converter.py goes between those and Hugging Face's",
    ),
    (
        r"(.+\.)?decoder\.layers\.\d+\.(inter_attention\.(query|key_value|dense)"
        r"|cross_attention\.linear_(q|kv|proj))\.(weight|bias)",
        "those of Megatron's encoder with a decoder (T5)",
        "no family here has a decoder that looks at an encoder: `ckpt-tool families` lists what is read",
    ),
    (
        r"layers\.\d+\.attention\.wqkv\.weight",
        "gpt-fast's own names, with queries, keys and values in one matrix",
        "give the folder that model.pth was made from: gpt-fast leaves it as it was",
    ),
    (
        r"((?!model\.layers\.).+\.)?layers\.\d+\.(attention\.([qk]_norm\.weight|sinks)|moe\.experts\.\w+)",
        "torchtitan's own names of a model that is no Llama",
        "torchtitan writes those of Hugging Face: scripts/checkpoint_conversion/convert_to_hf.py, or a run"
        " with --checkpoint.last_save_in_hf",
    ),
    (
        r"(.+\.)?sequential\.\d+\.(attention\.(query_key_value|dense)|word_embeddings)\.(weight|bias)",
        "GPT-NeoX's own names, with layers as steps of a pipeline",
        "its tools/ckpts/convert_neox_to_hf.py writes those of Hugging Face",
    ),
    (
        r"(.+\.)?embedder\.weight",
        "Gemma as Google's gemma_pytorch has it, with projections that are joined",
        "get the release for transformers (Kaggle has it as a variation of its own), and give that folder",
    ),
)


def layout(names: Collection[str]) -> tuple[str, str, str] | None:
    """(whose layout a checkpoint with tensors of these names has, one of them, what to do), where it is one
    that nobody here reads."""
    for pattern, what, hint in _LAYOUTS:
        found = re.compile(pattern, re.ASCII).fullmatch
        if name := next(filter(found, names), None):
            return what, name, hint
    return None


# GPT-2's names with each matrix as (out, in): the first model with these is one of Conv1D's, (in, out).
TURNING = ("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight")  # the ends of names that tell
TURNED = (
    "GPT-2's names over matrices of (out, in), as nn.Linear and nanoGPT have them",
    "transpose attn.c_attn, attn.c_proj, mlp.c_fc and mlp.c_proj of every layer, which GPT-2's class has as"
    " (in, out), and save them as pytorch_model.bin beside a config.json of GPT2LMHeadModel with the gelu of"
    " the run (nanoGPT's is `gelu`); where it has no biases, add zeros",
)


def turned(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str, str] | None:
    """The same of the tensors whose names end as `TURNING` says, by their shapes."""
    fused = next((n for n in shapes if n.endswith(TURNING[0])), "")
    up = next((n for n in shapes if n.endswith(TURNING[1])), "")
    rows, columns = (*shapes.get(fused, ()), 0, 0)[:2]
    wide = (
        rows == 3 * columns > 0 and len(shapes.get(up, ())) == 2 and shapes[up][1] == columns < shapes[up][0]
    )
    return (TURNED[0], fused, TURNED[1]) if wide else None


_OF_A_CACHE = "fake_quantizer"  # in the names of scales of keys and values, which are no weights


def packed(names: Collection[str]) -> tuple[str, str, str] | None:
    """(what a checkpoint with tensors of these names holds, one of them, what to do), where they are no plain
    weights."""
    weights = (n for n in names if _OF_A_CACHE not in n)
    tails = {".".join(n.rsplit(".", 3)[-3:]).lower(): n for n in weights}
    some = _those_with("|".join(pattern for pattern, _, _ in _PACKED), tails)
    for pattern, what, hint in _PACKED if some else ():
        if name := next((tails[tail] for tail in _those_with(pattern, some)), None):
            return what, name, hint
    for tail, name in tails.items():
        if tail.endswith(".scales") and f"{tail.removesuffix('scales')}biases" in tails:
            return "MLX weights of few bits", name, UNQUANTISED
    return None


def _those_with(pattern: str, tails: Iterable[str]) -> list[str]:
    """Those of the ends of names whose last parts are as `pattern` says."""
    found = re.compile(rf"(?:.*\.)?(?:{pattern})", re.ASCII).fullmatch
    return [tail for tail in tails if found(tail)]


def is_legacy(head: bytes) -> bool:
    """Whether a file that starts with `head` (32 bytes) holds the magic number of the legacy stream."""
    return head[:1] == b"\x80" and LEGACY_MAGIC.to_bytes(10, "little") in head[2:32]


def is_tar_header(block: bytes) -> bool:
    """Whether `block` starts like a tar header: 512 bytes whose checksum is right."""
    if len(block) < TAR_BLOCK or not block.strip(b"\0"):
        return False
    try:
        stated = int(block[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    return stated == tar_checksum(block)


def tar_checksum(block: bytes) -> int:
    return sum(block[:148]) + 8 * ord(" ") + sum(block[156:TAR_BLOCK])
