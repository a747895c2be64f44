"""What `evaluation.py` evaluates: two tasks of lm-evaluation-harness that need no network, and a model's directory.

The tasks are JSONL files and YAML that names them: `local_choice`, of multiple choices behind a common instruction, and
`local_answer`, of answers that are generated until a line ends. Questions are made of numbers and words from a seed.
"""

import json
import random
from pathlib import Path

import numpy as np
from twinmesh.models.checkpoints.state_dict import sources_by_path
from twinmesh.models.families.tensor_source import Source
from twinmesh.models.loaded import LoadedModel

CHOICE, ANSWER = "local_choice", "local_answer"
_WORDS = (
    "apple",
    "river",
    "stone",
    "cloud",
    "engine",
    "garden",
    "letter",
    "mirror",
    "paper",
    "silver",
    "window",
    "yellow",
)
_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {output_type}
doc_to_text: "{{{{context}}}}"
{rest}metadata:
  version: 1.0
"""
_CHOICE = """\
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
_ANSWER = """\
doc_to_target: " {{answer}}"
generation_kwargs:
  until: ["\\n\\n"]
  do_sample: false
  max_gen_toks: 32
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path, count: int, shots: int = 3, seed: int = 0) -> Path:
    """Write both tasks, of `count` documents each with `shots` solved ones before, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    solved = "".join(f"{question} {answer}\n\n" for question, answer in (_question(draw) for _ in range(shots)))
    for name, output_type, rest in ((CHOICE, "multiple_choice", _CHOICE), (ANSWER, "generate_until", _ANSWER)):
        data = folder / f"{name}.jsonl"
        documents = [_document(draw, solved) for _ in range(count)]
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        text = _YAML.format(name=name, data=data.absolute(), output_type=output_type, rest=rest)
        (folder / f"{name}.yaml").write_text(text)
    return folder


def _question(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(_WORDS, 3)
    number = draw.randint(2, 9)
    return (
        f"Question: A box holds {number} {words[0]}s, a {words[1]} and a {words[2]}. What is counted?\nAnswer:",
        words[0],
    )


def _document(draw: random.Random, solved: str) -> dict[str, object]:
    question, answer = _question(draw)
    others = draw.sample([word for word in _WORDS if word != answer], 3)
    choices = [answer, *others]
    draw.shuffle(choices)
    context = f"Answer each question with what was counted in the box.\n\n{solved}{question}"
    return {"context": context, "choices": [f" {c}" for c in choices], "label": choices.index(answer), "answer": answer}


def write_directory(folder: Path, model: LoadedModel, chat_template: str | None = None) -> Path:
    """Write a Llama in float32 as transformers reads it, with its tokenizer, and return the folder.

    Raises:
        ValueError: another family.
    """
    config = model.config
    if config.family != "llama" or config.experts is not None or any(spec.window for spec in config.layers):
        raise ValueError(f"A model of the family {config.family} is not written here: give a Llama.")
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save_file

    tensors = {}
    for path, place in sources_by_path(config).items():
        assert isinstance(place, Source)
        rows, columns = place.taken
        array = np.asarray(model.params[path], np.float32)
        matrix = array.reshape(columns, rows).T if place.transposed else array.reshape(rows, columns)
        tensors[place.tensor] = np.ascontiguousarray(matrix.reshape(place.shape))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_settings(model), indent=2))
    model.tokenizer.backend.save(str(folder / "tokenizer.json"))
    special = model.tokenizer.special
    names: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", **special.standard}
    if chat_template is not None:
        names["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2))
    return folder


def _settings(model: LoadedModel) -> dict[str, object]:
    config, tokenizer = model.config, model.tokenizer
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "max_position_embeddings": config.max_position,
        "rope_theta": config.layers[0].rope.theta, "hidden_act": "silu", "torch_dtype": "float32",
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
