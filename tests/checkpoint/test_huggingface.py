"""A Hugging Face folder as a source: names, dtypes, spellings, shards."""

import json

import numpy as np
import pytest
from make import TINY, bf16_bits, bf16_values, tiny_arrays, tiny_hf

from npmix.checkpoint import open_checkpoint
from npmix.quant.pack import dequantize

W_GATE = "model.layers.{}.block_sparse_moe.experts.{}.w1.weight"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_tensors_are_the_files_own_numbers(tmp_path, dtype):
    """Each tensor is the file's, in its own dtype, read-only, under our name."""
    arrays = tiny_arrays(TINY)
    with open_checkpoint(tiny_hf(tmp_path, dtype=dtype)) as source:
        assert source.names() == list(source.config.tensor_shapes())
        seen = {
            "wq": "model.layers.1.self_attn.q_proj.weight",
            "wo": "model.layers.1.self_attn.o_proj.weight",
            "attention_norm": "model.layers.1.input_layernorm.weight",
            "ffn_norm": "model.layers.1.post_attention_layernorm.weight",
            "router": "model.layers.1.block_sparse_moe.gate.weight",
            "experts.3.w_gate": W_GATE.format(1, 3),
            "experts.3.w_down": W_GATE.format(1, 3).replace("w1", "w2"),
            "experts.3.w_up": W_GATE.format(1, 3).replace("w1", "w3"),
        }
        for ours, theirs in seen.items():
            tensor = source.tensor("layers.1." + ours)
            assert tensor.format == dtype and tensor.shape == tensor.data.shape and not tensor.data.flags.writeable
            x = arrays[theirs]
            expected = bf16_values(bf16_bits(x)) if dtype == "bf16" else x.astype({"f32": "f4", "f16": "f2"}[dtype]).astype(np.float32)
            assert (dequantize(tensor) == expected).all()
        del tensor


def test_shards_and_single_file_are_equal(tmp_path):
    """The same weights from one file and from three with an index."""
    with open_checkpoint(tiny_hf(tmp_path / "a")) as one, open_checkpoint(tiny_hf(tmp_path / "b", shards=3)) as three:
        for name in one.names():
            assert (one.tensor(name).data == three.tensor(name).data).all()


def test_fused_experts_are_slices(tmp_path):
    """mlp.experts.gate_up_proj and down_proj are read as views: the same weights as the spelling by expert."""
    with open_checkpoint(tiny_hf(tmp_path / "a")) as plain, open_checkpoint(tiny_hf(tmp_path / "b", fused=True)) as fused:
        for name in plain.names():
            a, b = plain.tensor(name), fused.tensor(name)
            assert a.shape == b.shape and (a.data == b.data).all() and b.data.flags.c_contiguous
            fused.release(name)
            assert (a.data == b.data).all()


def test_mistral_names(tmp_path):
    """A dense model's mlp.{gate,up,down}_proj are the one expert's matrices."""
    with open_checkpoint(tiny_hf(tmp_path, mistral=True, dtype="f32")) as source:
        arrays = tiny_arrays(json.loads((tmp_path / "config.json").read_text()))
        assert (source.tensor("layers.0.experts.0.w_down").data == arrays["model.layers.0.mlp.down_proj.weight"]).all()
        assert "layers.0.router" not in source.names()


def test_tied_embeddings(tmp_path):
    """With tied embeddings "output" is tok_embeddings, whether or not the file also has lm_head."""
    with open_checkpoint(tiny_hf(tmp_path, tie_word_embeddings=True)) as source:
        assert "output" not in source.names()
        assert source.tensor("output").address == source.tensor("tok_embeddings").address


def test_unneeded_tensors_are_ignored(tmp_path):
    """rotary_emb.inv_freq of old files is not needed and not read, whatever its dtype."""
    from make import encode, write_safetensors

    raw = {name: ("F32", a.shape, encode(a, "f32")) for name, a in tiny_arrays(TINY).items()}
    raw["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F64", (8,), bytes(64))
    tiny_hf(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", raw)
    open_checkpoint(tmp_path).close()


def test_instruct_is_recognised(tmp_path):
    """A chat template or a name that says so makes an instruct model; nothing else does."""
    assert not open_checkpoint(tiny_hf(tmp_path / "base")).is_instruct
    assert open_checkpoint(tiny_hf(tmp_path / "Mixtral-Instruct")).is_instruct
    assert open_checkpoint(tiny_hf(tmp_path / "x", _name_or_path="org/Tiny-Instruct-v0.1")).is_instruct
    folder = tiny_hf(tmp_path / "y")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": None}))
    assert not open_checkpoint(folder).is_instruct
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert open_checkpoint(folder).is_instruct


def test_close_with_a_view_alive(tmp_path):
    """A tensor that outlives close() stays readable: the map goes with its last view."""
    source = open_checkpoint(tiny_hf(tmp_path))
    tensor = source.tensor("norm")
    before = tensor.data.copy()
    source.close()
    assert (tensor.data == before).all()


def test_shapes_are_worked_out_once(tmp_path, monkeypatch):
    """Reading tensors does not list all shapes of the model again each time."""
    with open_checkpoint(tiny_hf(tmp_path, fused=True)) as source:
        monkeypatch.setattr(type(source.config), "tensor_shapes", None)
        for name in source.names():
            source.tensor(name)
            source.release(name)


def test_tokenizer_path(tmp_path):
    """tokenizer.model is found, or None."""
    assert open_checkpoint(tiny_hf(tmp_path / "a")).tokenizer_path is None
    assert open_checkpoint(tiny_hf(tmp_path / "b", tokenizer=True)).tokenizer_path.name == "tokenizer.model"


@pytest.mark.transformers
@pytest.mark.parametrize("mistral", [False, True])
def test_transformers_writes_what_we_read(tmp_path, mistral):
    """A model saved by transformers opens, with the same numbers under our names."""
    import torch
    import transformers

    kind = ("Mistral" if mistral else "Mixtral") + "ForCausalLM"
    loaded = getattr(transformers, kind).from_pretrained(tiny_hf(tmp_path / "a", mistral=mistral), dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "b")
    with open_checkpoint(tmp_path / "a") as ours, open_checkpoint(tmp_path / "b") as theirs:
        assert ours.config == theirs.config
        for name in ours.names():
            assert (ours.tensor(name).data == theirs.tensor(name).data).all()
