"""How the files of a torch.distributed.checkpoint folder are called; apart from their readers, which are only
loaded for such a folder."""

FORMAT = "dcp"
METADATA = ".metadata"
DATA = ".distcp"
COMMON = "common.pt"  # what Megatron up to 0.16 keeps of the run, beside the tensors
