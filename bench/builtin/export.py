"""Step 7: write the files that are shipped.

    python -m bench builtin export --work W --out DIR

Scores are calibrated on the validation lists (Platt scaling: one factor and one offset, which become part of the last
layer). Weights are stored in float16, half as many bytes; the configuration says float32, so that they are loaded in
float32. The tokenizer is written as plain files, which old and new versions of `transformers` read. The model card is
not changed.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from transformers import BertForSequenceClassification

from bench.builtin.records import RankedList
from bench.builtin.train import Source, evaluate, score

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CUTS = (0.1, 0.3, 0.5)


def flatten(source: Source, lists: list[RankedList], scores: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The pairs of all lists: the model's logit, whether the passage is relevant, and the kind of query."""
    return {
        "logits": np.concatenate(scores),
        "relevant": np.array([flag for item in lists for flag in item.relevant]),
        "kind": np.array([source.queries[item.query].kind for item in lists for _ in item.docs]),
    }


def calibrate(model: BertForSequenceClassification, pairs: dict[str, np.ndarray]) -> tuple[float, float]:
    """Scale and shift the last layer, so that the sigmoid of a logit is the probability that the pair is relevant."""
    fit = LogisticRegression(C=100.0).fit(pairs["logits"][:, None], pairs["relevant"])
    factor, offset = float(fit.coef_[0, 0]), float(fit.intercept_[0])
    with torch.no_grad():
        model.classifier.weight.mul_(factor)
        model.classifier.bias.mul_(factor).add_(offset)
    return factor, offset


def distribution(pairs: dict[str, np.ndarray], factor: float, offset: float) -> str:
    """A Markdown table of the calibrated scores' quantiles."""
    scores = 1 / (1 + np.exp(-(factor * pairs["logits"] + offset)))
    columns = [f"{q:.0%}" for q in QUANTILES] + [f"at {cut} or more" for cut in CUTS]
    lines = ["| pairs | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for kind in [*sorted(set(pairs["kind"])), "all"]:
        for flag, name in ((True, "relevant"), (False, "others")):
            chosen = scores[(pairs["relevant"] == flag) & ((pairs["kind"] == kind) | (kind == "all"))]
            cells = [f"{value:.3f}" for value in np.quantile(chosen, QUANTILES)]
            cells += [f"{(chosen >= cut).mean():.1%}" for cut in CUTS]
            lines.append(f"| {kind}, {name} ({len(chosen)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(validation: dict[str, dict[str, float]]) -> str:
    """A Markdown table of `evaluate`'s result."""
    columns = ["lists", "BM25", "bi-encoder", "teacher", "student"]
    lines = [f"| pool/kind | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | {' | '.join(str(row[column]) for column in columns)} |" for name, row in validation.items()]
    return "\n".join(lines)


def write_files(model: BertForSequenceClassification, tokenizer: Tokenizer, folder: Path) -> None:
    """Everything `CrossEncoder(folder)` needs, and nothing else."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "torch_dtype": "float32",
        "dtype": "float32",
        **{
            name: getattr(model.config, name)
            for name in (
                "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                "hidden_act", "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "initializer_range",
                "pad_token_id",
            )
        },
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "position_embedding_type": "absolute",
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
    }  # fmt: skip
    special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    names = {f"{name}_token": token for name, token in special.items()}
    settings = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "model_max_length": model.config.max_position_embeddings,
        **names,
    }
    for name, content in (("config", config), ("tokenizer_config", settings), ("special_tokens_map", names)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    ids = tokenizer.get_vocab(with_added_tokens=False)
    (folder / "vocab.txt").write_text("\n".join(sorted(ids, key=ids.__getitem__)) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Calibrate and write; each new file replaces the old one in one step."""
    parser = argparse.ArgumentParser(prog="python -m bench builtin export", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder of intermediate files")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--lists", type=int, default=1000, help="validation lists to calibrate on, at most")
    parser.add_argument("--model", type=Path, help="the model to export (default: the checkpoint in --work)")
    options = parser.parse_args(argv)
    checkpoint = options.model or options.work / "checkpoint"
    model = BertForSequenceClassification.from_pretrained(checkpoint).eval()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    source = Source(options.work, tokenizer)
    lists = source.validation[: options.lists]
    special = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    scores = [score(model, source, item, special) for item in lists]
    print(table(evaluate(source, lists, scores)))
    pairs = flatten(source, lists, scores)
    said = [score(model, source, item, special) for item in source.rivals]
    factor, offset = calibrate(model, pairs)
    print(f"calibration: {factor:.3f} x logit {offset:+.3f}\n\n{distribution(pairs, factor, offset)}\n")
    if said:  # only after `contrast`
        print(f"answers and impostors:\n\n{distribution(flatten(source, source.rivals, said), factor, offset)}\n")

    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=".builtin-") as folder:
        write_files(model, tokenizer, Path(folder))
        for path in sorted(Path(folder).iterdir()):
            path.chmod(0o644)
            os.replace(path, options.out / path.name)
    total = sum(path.stat().st_size for path in options.out.iterdir() if path.is_file())
    print(f"{options.out}: {total / 1e6:.2f} MB")
    return 0
