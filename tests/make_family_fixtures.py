"""Write tests/fixtures/families and gemma3_logits.npz: what Hugging Face transformers says about every family.

Run by a maintainer, with the same Python as `make_fixtures.py`, which also runs the first half of this:

    python tests/make_family_fixtures.py [--gemma gemma-3-270m-q4_k_m.gguf] [--only gpt_oss mixtral] [--hidden]

Of each tiny model of `helpers/tiny_families.py` and `helpers/packed.py`: config.json as transformers writes it, where
the family has one also as files on the hub still have it (which transformers must read as the same model), the float32
logits of a prompt that is longer than every window, and what greedy sampling makes of a shorter one; in one file for
all of them some hidden states of that prompt, which `--hidden` alone writes anew.
"""
# Its packages are not in this project's environment.
# mypy: ignore-errors

import argparse
import itertools
import json
import re
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.insert(0, str(ROOT / "tests"))

from helpers.packed import PACKED  # noqa: E402
from helpers.tiny_families import TINY, TOKENS  # noqa: E402

PROMPT, SHORT_PROMPT, GREEDY = 40, 21, 32
POSITIONS = (0, 7, 39)
LEAST_MARGIN, LEAST_DISTINCT = 0.02, 16
PHOTOSYNTHESIS = "Photosynthesis is the process by which"
PASSAGE = (
    "The lighthouse keeper counted 1,027 steps every evening, and every evening he arrived at a different number. "
    "Some nights the sea was loud; some nights it only breathed. He wrote both down in a small blue book, because a "
    "number that changes is still a fact, and facts, he'd say, keep better than fish do. "
)
ROWS, COLUMNS, TOP = (0, 1, 2, 5, 40, 130, 300, 509, 510, 511, 512, 513, 514, 600, 640, 699), 48, 20


def build(model, config):
    """The float32 model of transformers holding exactly the weights of `model`."""
    built = getattr(transformers, model.model_class)(config).float().eval()
    load(built, model.weights())
    return built


def load(built, weights):
    """Load every weight, and no other."""
    state = {name: torch.from_numpy(weight) for name, weight in with_stacked_experts(weights).items()}
    if built.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    built.load_state_dict(state, strict=True)


def with_stacked_experts(weights):
    """Weights with the matrices of all experts of a layer in one array, gate before up, as transformers 5 has them."""
    out, parts = {}, {}
    for name, weight in weights.items():
        name = name.replace("block_sparse_moe", "mlp")
        match = re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name)
        if match is None:
            out[name] = weight
        else:
            kind = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(match[2], match[2])
            parts.setdefault(match[1], {}).setdefault(kind, []).append(weight)
    for prefix, stacks in parts.items():
        gate, up, down = (np.stack(stacks[kind]) for kind in ("gate_proj", "up_proj", "down_proj"))
        out |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}.down_proj": down}
    return out


@torch.no_grad()
def logits(built, ids):
    """[T, V] float32."""
    return built(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def greedy(built, ids, count):
    """Greedy continuation, recomputed from scratch at every token; refuses one that a rounding error could change."""
    out = []
    for _ in range(count):
        scores = logits(built, ids + out)[-1]
        second, first = np.sort(scores)[-2:]
        if first - second < LEAST_MARGIN:
            raise SystemExit(f"The best two tokens are {first - second:.3f} apart: take another seed.")
        out.append(int(scores.argmax()))
    return out


def written_config(built):
    """config.json as `save_pretrained` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(folder)
        return json.loads((Path(folder) / "config.json").read_text())


def hub_config(config, model):
    """The same in the form that files had before transformers 5: rope settings at the top level, `torch_dtype`, and
    no `layer_types` before 4.55."""
    old = dict(config)
    rope, old["torch_dtype"] = old.pop("rope_parameters"), old.pop("dtype")
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    else:
        old.pop("layer_types", None)
    old["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    old["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    old["transformers_version"] = "4.51.0"
    old |= model.on_hub
    return {key: value for key, value in sorted(old.items()) if key not in model.not_on_hub}


def tiny_family(model):
    """Configurations, logits and greedy tokens of one tiny model."""
    config_class = getattr(transformers, model.config_class)
    built = build(model, config_class(**model.settings, attn_implementation="eager"))
    random = np.random.RandomState(1)
    short, ids = (random.randint(4, len(TOKENS), length).tolist() for length in (SHORT_PROMPT, PROMPT))
    scores, tokens = logits(built, ids), greedy(built, short, GREEDY)
    if len(set(tokens)) < LEAST_DISTINCT:
        raise SystemExit(f"{model.name} repeats itself: take another seed.")
    folder = FIXTURES / "families"
    config = written_config(built)
    write_json(folder / f"{model.name}.json", config)
    if model.on_hub is not None:
        old = hub_config(config, model)
        again = build(model, config_class.from_dict(old, attn_implementation="eager"))
        np.testing.assert_array_equal(logits(again, ids), scores)
        write_json(folder / f"{model.name}.hub.json", old)
    arrays = dict(ids=ids, prompt_ids=short, greedy_ids=tokens)
    arrays = {name: np.array(value, np.int32) for name, value in arrays.items()}
    np.savez_compressed(folder / f"{model.name}.npz", logits=scores, **arrays)


@torch.no_grad()
def hidden_states():
    """Of each tiny model, for the prompt of its fixture: hidden states after the embeddings, the first layer and the
    last one, at three positions, and the mean of the last over all."""
    out = {}
    for model in TINY.values():
        config = getattr(transformers, model.config_class)(**model.settings, attn_implementation="eager")
        ids = np.load(FIXTURES / "families" / f"{model.name}.npz")["ids"].tolist()
        states = build(model, config)(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
        out[model.name] = np.stack([states[layer][0, list(POSITIONS)].numpy() for layer in (0, 1, -1)])
        out[f"{model.name}_mean"] = states[-1][0].numpy().mean(0)
    np.savez_compressed(FIXTURES / "families" / "hidden_states.npz", **out)


def write_json(path, value):
    """As transformers lays it out."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def families(names=()):
    """Every tiny model, or those of these names."""
    torch.set_num_threads(1)
    (FIXTURES / "families").mkdir(parents=True, exist_ok=True)
    for model in (*TINY.values(), *PACKED.values()):
        if not names or model.name in names:
            tiny_family(model)


class HandSPM:
    """A SentencePiece-like vocabulary as llama.cpp applies it: always the merge whose result scores best. Slow, plain,
    and for ASCII text only."""

    def __init__(self, tokens, scores):
        """GGUF's lists."""
        self.ids, self.scores = {token: i for i, token in enumerate(tokens)}, scores

    def encode(self, text):
        """BOS, then the ids of `text`; no space is put in front."""
        parts = list(text.replace(" ", "\u2581"))
        while True:
            merged = [self.ids.get(a + b) for a, b in itertools.pairwise(parts)]
            known = [i for i, token in enumerate(merged) if token is not None]
            if not known:
                return [self.ids["<bos>"], *(self.ids[part] for part in parts)]
            best = max(known, key=lambda i: (self.scores[merged[i]], -i))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]


def gemma_model(reader, facts):
    """`Gemma3ForCausalLM` with the dequantised weights of the file."""
    prefix = "gemma3."
    config = transformers.Gemma3TextConfig(
        vocab_size=len(facts["tokenizer.ggml.tokens"]),
        hidden_size=facts[prefix + "embedding_length"],
        intermediate_size=facts[prefix + "feed_forward_length"],
        num_hidden_layers=facts[prefix + "block_count"],
        num_attention_heads=facts[prefix + "attention.head_count"],
        num_key_value_heads=facts[prefix + "attention.head_count_kv"],
        head_dim=facts[prefix + "attention.key_length"],
        query_pre_attn_scalar=facts[prefix + "attention.key_length"],
        sliding_window=facts[prefix + "attention.sliding_window"],
        max_position_embeddings=facts[prefix + "context_length"],
        rms_norm_eps=facts[prefix + "attention.layer_norm_rms_epsilon"],
        attn_implementation="eager",
    )
    built = transformers.Gemma3ForCausalLM(config).float().eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    arrays = {t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    weights = {}
    for name in built.state_dict():
        if name != "lm_head.weight":
            weight = arrays.pop(names.get_name(name, try_suffixes=(".weight",)))
            weights[name] = weight - 1 if name.endswith("norm.weight") else weight
    if arrays:
        raise SystemExit(f"Not used: {sorted(arrays)}")
    load(built, weights)
    return built


def gemma(path):
    """Logits of a passage longer than the window, and the greedy continuation of a sentence."""
    reader = gguf.GGUFReader(path)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    spm = HandSPM(facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.scores"])
    built = gemma_model(reader, facts)
    ids, question = spm.encode(PASSAGE * 10)[: ROWS[-1] + 1], spm.encode(PHOTOSYNTHESIS)
    with torch.no_grad():
        hidden = built.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, list(ROWS)]
        scores = built.lm_head(hidden).numpy()
    columns = np.sort(np.random.RandomState(0).choice(scores.shape[1], COLUMNS, replace=False))
    top = np.argsort(-scores, axis=-1, kind="stable")[:, :TOP]
    answer = greedy(built, question, 10)
    print(PHOTOSYNTHESIS, [facts["tokenizer.ggml.tokens"][i] for i in answer])
    integers = dict(ids=ids, rows=ROWS, columns=columns, top_ids=top, question_ids=question, answer_ids=answer)
    np.savez_compressed(
        FIXTURES / "gemma3_logits.npz",
        column_logits=scores[:, columns],
        top_logits=np.take_along_axis(scores, top, axis=-1),
        **{name: np.array(value, np.int32) for name, value in integers.items()},
    )


def main():
    """Write the tiny models' fixtures, and the real one's if it is given."""
    parser = argparse.ArgumentParser(description="Write tests/fixtures/families, and gemma3_logits.npz.")
    parser.add_argument("--gemma", type=Path, help="gemma-3-270m-q4_k_m.gguf")
    parser.add_argument("--only", nargs="*", default=(), metavar="NAME", help="tiny models; without it all of them")
    parser.add_argument("--hidden", action="store_true", help="only the hidden states, for fixtures that are there")
    arguments = parser.parse_args()
    path = arguments.gemma
    if not arguments.hidden:
        families(arguments.only)
    hidden_states()
    if path is not None:
        gemma(path)


if __name__ == "__main__":
    main()
