"""Step 5: train the student to order passages and to give a calibrated score.

    python -m bench builtin train --work W --minutes 80

The loss has four terms, for each list of candidates of one query:

- order: the student's softmax over the list against the teacher's (the sum of the z-scores of BM25 and cosine, raised
  for a known answer);
- distances: the student's scores less their mean, against the teacher's less theirs;
- probability: binary cross-entropy of each score against the label, or, without a label, against the teacher's
  calibrated probability;
- matching: the vectors of the query's tokens, one layer before the last, must tell whether the passage has the same
  token, and how near its nearest token is. Two small heads predict this, and are dropped after training. The lower
  layers come from a bi-encoder and have never seen two texts at once; this term teaches them to match tokens.

The learning rate follows the larger of the two progresses, by `--steps` and by `--minutes`, so that on a busy machine
training does not end at a high learning rate. Only with `--steps` alone is the result reproducible.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AttentionInterface, BertForSequenceClassification
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from bench.builtin.contrast import IMPOSTORS
from bench.builtin.records import Passage, Query, RankedList, read
from bench.builtin.student import build, choose_vocabulary, prune_tokenizer
from bench.quality.retrieval import bi_encoder_path, half_precision

MAX_QUERY, MAX_PAIR = 192, 320
#: the lengths at which the pairs of a list are cut: short for speed, and sometimes long, so that the student knows long
#: pairs. A query's tokens beyond SHORT_QUERY are added to the length, so that the passage keeps its own.
CUTS, SHORT_QUERY = (96, 112, 128, 160, 256), 40
#: how much a known answer's teacher score is raised, in z-scores
LABELLED_BONUS, MADE_BONUS = 3.0, 0.7
#: how many of the lists come from people's questions, and how often each of those is used
LABELLED_SHARE, REPEAT = 0.45, {"claim": 4, "pubmedqa": 2, "conclusion": 2}


@dataclass
class Example:
    """One list as the student's input."""

    query: list[int]
    docs: list[list[int]]
    target: np.ndarray
    probability: np.ndarray
    forced: list[int]


class Source:
    """Lists turned into examples, with every text tokenized once."""

    def __init__(self, work: Path, tokenizer: Tokenizer) -> None:
        self.passages, self.queries = read(work / "passages.jsonl", Passage), read(work / "queries.jsonl", Query)
        self.lists = read(work / "lists.jsonl", RankedList)
        self._calibration = json.loads((work / "calibration.json").read_text())
        self._bodies = [item.ids for item in self._encode(tokenizer, [item.text for item in self.passages])]
        self._titles = [item.ids for item in self._encode(tokenizer, [item.title for item in self.passages])]
        self._questions = [item.ids for item in self._encode(tokenizer, [item.text for item in self.queries])]
        self._mark = tokenizer.token_to_id("?")
        asked = [self.queries[item.query] for item in self.lists]
        pairs = list(zip(self.lists, asked, strict=True))
        self.training = [item for item, query in pairs if not query.validation]
        self.validation = [item for item, query in pairs if query.validation and query.kind != "impostor"]
        #: lists of an answer and its impostor
        self.rivals = [item for item, query in pairs if query.validation and query.kind == "impostor"]

    @staticmethod
    def _encode(tokenizer: Tokenizer, texts: list[str]) -> list:
        return tokenizer.encode_batch(texts, add_special_tokens=False)

    def example(self, item: RankedList, generator: random.Random, cuts: Sequence[int] = CUTS) -> Example:
        """The list with the teacher's scores, and with small random changes of its texts."""
        query = self.queries[item.query]
        question = self._questions[item.query][:MAX_QUERY]
        if question[-1:] == [self._mark] and generator.random() < 0.3:
            question = question[:-1]
        flags = np.array(item.relevant, dtype=np.float32)
        z = np.array(item.bm25, dtype=np.float32) + np.array(item.cosine, dtype=np.float32)
        rows = np.stack([item.bm25, item.cosine, item.similarity], axis=1)
        guess = 1 / (1 + np.exp(-(rows @ self._calibration["weights"] + self._calibration["bias"])))
        if query.labelled:
            probability = np.where(flags > 0, 0.97, 0.5 * guess)
        else:
            probability = np.where(flags > 0, np.maximum(guess, 0.6), guess)
        room = generator.choice(cuts) - min(len(question), SHORT_QUERY) - 3
        bonus = LABELLED_BONUS if query.labelled else MADE_BONUS
        return Example(
            query=question,
            docs=[self._document(doc, query, generator)[:room] for doc in item.docs],
            target=z + bonus * flags,
            probability=probability.astype(np.float32),
            forced=[place for place, flag in enumerate(item.relevant) if flag or place == item.impostor],
        )

    def _document(self, number: int, query: Query, generator: random.Random) -> list[int]:
        """An abstract often comes with its title, but not with one that is the query itself."""
        body = self._bodies[number]
        passage = self.passages[number]
        titled = passage.pool == "abstracts" and passage.title != query.text and generator.random() < 0.7
        return (self._titles[number] + body if titled else body) or [self._mark]


@dataclass
class Batch:
    """Padded pairs of several lists; `owner` says which list each belongs to."""

    ids: torch.Tensor
    types: torch.Tensor
    mask: torch.Tensor
    owner: torch.Tensor
    target: torch.Tensor
    probability: torch.Tensor


def collate(examples: Sequence[tuple[Example, Sequence[int]]], cls: int, sep: int) -> Batch:
    """The chosen candidates of each example, padded to equal numbers."""
    rows, types, owner, target, probability = [], [], [], [], []
    for number, (example, chosen) in enumerate(examples):
        head = [cls, *example.query, sep]
        for place in chosen:
            body = [*example.docs[place][: MAX_PAIR - len(head) - 1], sep]
            rows.append(head + body)
            types.append([0] * len(head) + [1] * len(body))
            owner.append(number)
            target.append(example.target[place])
            probability.append(example.probability[place])
    width = max(map(len, rows))
    pad = [[0] * (width - len(row)) for row in rows]
    return Batch(
        ids=torch.tensor([row + fill for row, fill in zip(rows, pad, strict=True)]),
        types=torch.tensor([row + fill for row, fill in zip(types, pad, strict=True)]),
        mask=torch.tensor([[1] * len(row) + fill for row, fill in zip(rows, pad, strict=True)]),
        owner=torch.tensor(owner),
        target=torch.tensor(np.array(target)),
        probability=torch.tensor(np.array(probability)),
    )


def endless(items: list[RankedList], generator: random.Random) -> Iterator[RankedList]:
    """The items pass after pass, each time in a new order."""
    while True:
        yield from generator.sample(items, len(items))


def batches(
    source: Source, lists: list[RankedList], tokens: int, longest: int, generator: random.Random
) -> Iterator[list[tuple[Example, list[int]]]]:
    """Endless batches of about `tokens` tokens, of lists of similar length, each list cut to `longest` candidates."""
    queries = source.queries
    labelled = [item for item in lists if queries[item.query].labelled]
    known = endless([item for item in labelled for _ in range(REPEAT.get(queries[item.query].kind, 1))], generator)
    made = endless([item for item in lists if not queries[item.query].labelled], generator)
    while True:
        drawn = [next(known if generator.random() < LABELLED_SHARE else made) for _ in range(600)]
        prepared = []
        for item in drawn:
            example = source.example(item, generator)
            width = min(MAX_PAIR, len(example.query) + 3 + int(np.quantile([len(doc) for doc in example.docs], 0.8)))
            count = max(6, min(longest, 1600 // width, len(example.docs)))
            rest = [place for place in range(len(example.docs)) if place not in example.forced]
            chosen = example.forced[:3] + generator.sample(rest, min(len(rest), count - len(example.forced[:3])))
            prepared.append((max(len(example.docs[place]) for place in chosen), example, chosen))
        prepared.sort(key=lambda row: row[0])
        groups, group, pairs = [], [], 0
        for length, example, chosen in prepared:
            width = min(MAX_PAIR, length + len(example.query) + 3)
            if group and (pairs + len(chosen)) * width > tokens:
                groups.append(group)
                group, pairs = [], 0
            group.append((example, chosen))
            pairs += len(chosen)
        groups.append(group)
        generator.shuffle(groups)
        yield from groups


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **rest: object,
) -> tuple[torch.Tensor, None]:
    """Attention written out: its backward pass is three times as fast on a CPU as that of the fused one.

    It stays in what the linear layers are in, where autocast would have the softmax, and copies to it and from it, in
    float32.
    """
    with torch.autocast("cpu", enabled=False):
        weights = torch.matmul(query * scaling, key.transpose(2, 3))
        if attention_mask is not None:  # None where all pairs have one length
            weights = weights + attention_mask.to(query.dtype)
        return torch.matmul(weights.softmax(-1), value).transpose(1, 2).contiguous(), None


class Matching(torch.nn.Module):
    """The two heads of the matching term: is a query's token in the passage, and how near is the nearest token?"""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.heads = torch.nn.Linear(embeddings.shape[1], 2)
        self.register_buffer("fixed", functional.normalize(embeddings.detach().clone(), dim=1))

    def forward(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The loss over the query's tokens (the first segment, its [CLS] and [SEP] too: they match nothing)."""
        width = int((1 - batch.types).mul(batch.mask).sum(1).max())
        first = (batch.types[:, :width] == 0) & (batch.mask[:, :width] == 1)
        second = (batch.types == 1) & (batch.mask == 1)
        second &= batch.ids != batch.ids[:, :1]
        same = (batch.ids[:, :width, None] == batch.ids[:, None, :]) & second[:, None, :]
        exact = same.any(2).float()
        with torch.no_grad():
            vectors = self.fixed[batch.ids]
            near = vectors[:, :width] @ vectors.transpose(1, 2)  # in the dtype of the forward pass
            near = near.float().masked_fill(~second[:, None, :], -1.0).amax(2)
        said = self.heads(hidden[:, :width]).float()
        loss = functional.binary_cross_entropy_with_logits(said[..., 0], exact, reduction="none")
        loss = loss + 4 * (said[..., 1] - near).square()
        return loss[first].mean()


def ranking_loss(scores: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The terms order, distances and probability of the module's docstring."""
    lists = int(batch.owner[-1]) + 1
    same = batch.owner[None, :] == torch.arange(lists)[:, None]
    said = scores[None, :].expand(lists, -1).masked_fill(~same, -1e4)
    wanted = batch.target[None, :].expand(lists, -1).masked_fill(~same, -1e4)
    order = -(wanted.softmax(1) * said.log_softmax(1)).sum(1) + (wanted.softmax(1) * wanted.log_softmax(1)).sum(1)
    counts = same.sum(1)
    means = (same * scores[None, :]).sum(1) / counts, (same * batch.target[None, :]).sum(1) / counts
    distances = (scores - means[0][batch.owner]) - (batch.target - means[1][batch.owner])
    probability = functional.binary_cross_entropy_with_logits(scores, batch.probability)
    return order.mean() + 0.15 * distances.square().mean() + 0.5 * probability


def score(
    model: BertForSequenceClassification, source: Source, item: RankedList, special: tuple[int, int]
) -> np.ndarray:
    """The logits of a list's candidates."""
    batch = collate(
        [(source.example(item, random.Random(item.query), cuts=(MAX_PAIR,)), range(len(item.docs)))], *special
    )
    with torch.inference_mode(), half_precision():
        output = model(input_ids=batch.ids, token_type_ids=batch.types, attention_mask=batch.mask)
    return output.logits[:, 0].float().numpy()


def evaluate(source: Source, lists: list[RankedList], scores: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Mean nDCG@10 of lists, by pool and kind of query: the student's beside BM25's, the cosine's and the teacher's."""
    found = defaultdict(lambda: defaultdict(list))
    for item, values in zip(lists, scores, strict=True):
        query = source.queries[item.query]
        row = found[f"{query.pool.removesuffix('-validation')}/{query.kind}"]
        bm25, cosine = np.array(item.bm25), np.array(item.cosine)
        rankers = {"BM25": bm25, "bi-encoder": cosine, "teacher": bm25 + cosine, "student": values}
        for ranker, ranked in rankers.items():
            row[ranker].append(ndcg(ranked, np.array(item.relevant)))
    return {
        name: {"lists": len(row["BM25"])} | {ranker: round(float(np.mean(all_)), 3) for ranker, all_ in row.items()}
        for name, row in sorted(found.items())
    }


def ndcg(scores: np.ndarray, relevant: np.ndarray, k: int = 10) -> float:
    """nDCG@10 of one list, for validation during training; `bench quality` uses a library's."""
    discount = 1 / np.log2(np.arange(2, k + 2))
    ranked = relevant[np.argsort(-scores, kind="stable")][:k]
    return float((ranked * discount[: len(ranked)]).sum() / discount[: min(k, relevant.sum())].sum())


def main(argv: list[str]) -> int:
    """Train, and leave the model, its tokenizer and a log in `checkpoint/`."""
    parser = argparse.ArgumentParser(prog="python -m bench builtin train", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder of intermediate files")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=9000)
    parser.add_argument("--steps", type=int, default=12_000, help="the schedule's end in steps ...")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="... or in minutes, whichever comes first")
    parser.add_argument("--tokens", type=int, default=8192, help="of a batch, with padding")
    parser.add_argument("--longest", type=int, default=14, help="candidates of a list")
    parser.add_argument("--rate", type=float, default=2e-4, help="the highest learning rate")
    parser.add_argument("--start", type=Path, help="a model to go on from, with its tokenizer")
    parser.add_argument("--every", type=float, default=8.0, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.manual_seed(options.seed)
    generator = random.Random(options.seed)
    checkpoint = options.work / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)

    origin = bi_encoder_path()
    if options.start:
        tokenizer = Tokenizer.from_file(str(options.start / "tokenizer.json"))
        model = BertForSequenceClassification.from_pretrained(
            options.start, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    else:
        texts = [item.text for item in read(options.work / "passages.jsonl", Passage) if item.pool != IMPOSTORS]
        whole = Tokenizer.from_file(str(origin / "tokenizer.json"))
        whole.no_truncation()
        whole.no_padding()
        vocabulary = choose_vocabulary(whole, texts, options.vocabulary)
        tokenizer = prune_tokenizer(origin, vocabulary)
        model = build(origin, vocabulary, options.layers)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    source = Source(options.work, tokenizer)
    special = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")

    AttentionInterface.register("written out", attention)
    AttentionMaskInterface.register("written out", eager_mask)
    model.set_attn_implementation("written out")
    matching = Matching(model.bert.embeddings.word_embeddings.weight)
    heads = [*model.classifier.parameters(), *model.bert.pooler.parameters(), *matching.heads.parameters()]
    known = {id(parameter) for parameter in heads}
    body = [parameter for parameter in model.parameters() if id(parameter) not in known]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": options.rate}, {"params": heads, "lr": 3 * options.rate}],
        betas=(0.9, 0.98),
        weight_decay=0.01,
    )
    rates = [group["lr"] for group in optimizer.param_groups]

    def validate(limit: int | None = None) -> dict[str, dict[str, float]]:
        lists, rivals = source.validation[:limit], source.rivals[:limit]
        found = evaluate(source, lists, [score(model, source, item, special) for item in lists])
        before = [(answer > other).item() for answer, other in (score(model, source, item, special) for item in rivals)]
        if before:  # only after `contrast`
            found["answers before impostors"] = {"lists": len(before), "share": round(float(np.mean(before)), 3)}
        return found

    if options.start:
        print(json.dumps(validate(200)), flush=True)
    model.train()
    start = last = time.monotonic()
    pairs, sums = 0, np.zeros(2)
    for step, group in enumerate(batches(source, source.training, options.tokens, options.longest, generator)):
        minutes = (time.monotonic() - start) / 60
        progress = max(step / options.steps, minutes / options.minutes)
        if progress >= 1:
            break
        factor = min(1, (step + 1) / 200) * max(0.02, 0.5 * (1 + np.cos(np.pi * progress)))
        for place, rate in zip(optimizer.param_groups, rates, strict=True):
            place["lr"] = rate * factor
        batch = collate(group, *special)
        with half_precision():
            output = model.bert(
                input_ids=batch.ids, token_type_ids=batch.types, attention_mask=batch.mask, output_hidden_states=True
            )
            scores = model.classifier(output.pooler_output)[:, 0].float()
            ranking = ranking_loss(scores, batch)
            match = matching(output.hidden_states[-2], batch)
        loss = ranking + max(0.05, 0.6 * (1 - 2 * progress)) * match
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(body + heads, 1.0)
        optimizer.step()
        pairs += len(scores)
        sums += (ranking.item(), match.item())
        if (step + 1) % 50 == 0:
            print(
                f"{minutes:.1f} min, step {step + 1}, {pairs} pairs, progress {progress:.3f}: "
                f"ranking {sums[0] / 50:.4f}, matching {sums[1] / 50:.4f}",
                flush=True,
            )
            sums[:] = 0
        if time.monotonic() - last > 60 * options.every:
            model.save_pretrained(checkpoint)
            print(json.dumps(validate(200)), flush=True)
            last = time.monotonic()
    model.save_pretrained(checkpoint)
    report = {"steps": step, "pairs": pairs, "minutes": round((time.monotonic() - start) / 60, 1)}
    report["validation"] = validate()
    (checkpoint / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report), flush=True)
    return 0
