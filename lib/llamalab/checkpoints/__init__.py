"""Checkpoints: weights read one tensor at a time, recognised, digested, and written."""

import lazy_loader

_FACE = {
    "checkpoint": "BLOCK_BYTES Checkpoint SAFETENSORS_NAMES TensorSpec all_finite "
    "digest_tensors raw_bytes tensor_digest",
    "containers": "DirectFile write_safetensors write_torch_archive",
    "digests": "BLOCK Digests bytes_arrived checklist_facts compare_file diagnose_bytes "
    "diagnose_head hash_file is_safe_relative read_checklist",
    "layouts": "HFCheckpoint MetaCheckpoint RECORD open_checkpoint read_json",
    "output_directory": "Made exclusive refuse_changed state_of",
    "recognition": "part_of recognise_bases",
    "tensor_file": "TensorFile",
    "writer": "one_thread write",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
