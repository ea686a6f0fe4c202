"""Each protection of the reference, taken away: the fault it is there for is then silent. With it, it is not.

A fault gives a number, 0 where the reference is right. With the protection the number is 0, or the run stops with
the named error; without it the run goes through, and the number is far from 0. So every test here fails when its
protection is removed from the package, and when it is no longer needed.
"""

from __future__ import annotations

import copy
import functools
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, TrainerCallback

import tether.config.rules.reference
import tether.data.datasets
import tether.data.rows
import tether.reference.base
import tether.reference.explicit
import tether.reference.held
import tether.reference.implicit
import tether.reference.probing
import tether.reference.shared
import tether.reference.store_checks
import tether.reference.twin
import tether.reference.watch
import tether.store.exchange
import tether.store.record
import tether.store.schema
import tether.trainer.reference_run
import tether.trainer.run_saving
from support import odd_models as odd
from support.kinds import BATCH, adapted, dropping_gpt2, half_frozen_lora, llama_lora, lora, partly_frozen, train
from support.observe import bits, same_bits
from support.ropes import LIMIT, ROPES
from support.runs import as_dataset, curve, make_trainer, trained
from support.tiny import tiny_model, tiny_pairs
from tether.data.datasets import REFERENCE_CHECKSUM, TOKEN_COLUMNS, batch_of
from tether.errors import (
    ConfigurationError,
    DataError,
    DriftError,
    InitialGapError,
    MissingLogProbsError,
    ReferenceModelError,
    ResumeError,
    StoreError,
)
from tether.reference import (
    ExplicitReference,
    ImplicitReference,
    Placement,
    PrecomputedReference,
    Reference,
    ReferenceIdentity,
    SynchronizedReference,
)
from tether.scoring import score
from tether.scoring.fingerprint import Fingerprint
from tether.scoring.probe import probe_of
from tether.store import LogProbStore, export_parquet, import_parquet, prune
from tether.testing import naive_log_probs_of
from tether.trainer.reference_columns import with_reference_columns
from tether.types import PairBatch, Response

LOG_2 = 0.6931472

# ------------------------------------------------------------------------------------------------- the faults


def distance_from_start(trainer: Any) -> float:
    """How far the first loss is from log 2."""
    distance = abs(curve(trainer)[0] - LOG_2)
    return distance if distance > 1e-6 else 0.0


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    difference = float((one - other).abs().max())
    return difference if difference > 5e-6 else 0.0


def moves_with_training(build: Callable[[Any], Reference], policy: Any) -> float:
    """How far the reference's answers are from the initial policy's once the policy has trained."""
    meant = naive_log_probs_of(policy, BATCH)
    reference = build(policy)
    train(policy)
    return differs(reference.log_probs(BATCH).values, meant)


def is_not_the_policy(build: Callable[[Any], Reference], policy: Any) -> float:
    return differs(build(policy).log_probs(BATCH).values, naive_log_probs_of(policy, BATCH))


def changed_in_memory(folder: Path) -> float:
    """An instance whose memory differs from its folder."""
    tiny_model().save_pretrained(folder / "model")
    policy: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    train(policy)
    return distance_from_start(trained(folder, policy, max_steps=1))


def changed_in_between(folder: Path) -> float:
    """A policy that changes between building the trainer and training."""
    trainer = make_trainer(folder, max_steps=1)
    train(trainer.model)
    trainer.train()
    return distance_from_start(trainer)


class Reaches(TrainerCallback):
    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.parameter = parameter

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.parameter.mul_(1.5)


def reached_by_training(folder: Path) -> float:
    """A weight that is shared because it does not train, and is written to all the same."""
    policy = partly_frozen()
    reached = Reaches(policy.transformer.h[0].mlp.c_fc.weight)
    trainer = make_trainer(folder, policy, callbacks=[reached], save_strategy="steps", save_steps=1)
    before = trainer.reference.log_probs(BATCH).values
    trainer.train()
    return differs(trainer.reference.log_probs(BATCH).values, before)


RUN: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 0.03}


def resumed_differs(folder: Path, began: dict[str, Any], resumed: Callable[[], dict[str, Any]]) -> float:
    """The largest difference of the resumed run's losses to those of the uninterrupted one."""
    whole = trained(folder, **RUN, **began)
    again = make_trainer(folder, **RUN, **resumed())
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return float(np.abs(np.subtract(curve(whole)[2:], curve(again)[2:])).max())


def resumed_from_its_own_weights(folder: Path) -> float:
    return resumed_differs(folder, {}, lambda: {"model": str(folder / "checkpoint-2")})


def resumed_with_another_adapter(folder: Path) -> float:
    def continued(seed: int) -> Any:
        return {"model": adapted(tiny_model(), LoraConfig(r=4, init_lora_weights=False), seed)}

    return resumed_differs(folder, continued(0), lambda: continued(1))


def resumed_with_another_alpha(folder: Path) -> float:
    def fresh(alpha: int) -> dict[str, Any]:
        return {"peft_config": LoraConfig(r=4, lora_alpha=alpha)}

    return resumed_differs(folder, fresh(8), lambda: fresh(64))


def resumed_with_a_damaged_reference(folder: Path) -> float:
    """A page of zeros where weights of the reference were."""

    def damaged() -> dict[str, Any]:
        (path,) = (folder / "checkpoint-2" / "reference").glob("*.safetensors")
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4096] = bytes(4096)
        path.write_bytes(content)
        return FOLLOWING

    return resumed_differs(folder, FOLLOWING, damaged)


def resumed_with_another_beta(folder: Path) -> float:
    return resumed_differs(folder, {"beta": 0.1}, lambda: {"beta": 1.0})


FOLLOWING: dict[str, Any] = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}


def resumed_in_another_order(folder: Path) -> float:
    return resumed_differs(folder, {}, lambda: {"data_seed": 7})


def resumed_while_following(folder: Path) -> float:
    return resumed_differs(folder, FOLLOWING, lambda: FOLLOWING)


def shares_with_the_policy(folder: Path) -> float:
    """A `ref_model` around the policy's own parameters."""
    policy = tiny_model()
    other = copy.deepcopy(policy, {id(p): p for p in policy.parameters()})
    return moves_with_training(lambda policy: ExplicitReference.of_other_model(other, policy), policy)


def is_the_policy(folder: Path) -> float:
    """`ref_model=model` as a slip of the pen: a run that does nothing unusual must not hide it."""
    policy = tiny_model()
    make_trainer(folder, policy, ref_model=policy)
    return 1.0


def callers_model_moves(folder: Path) -> float:
    """TR-DPO moves the `ref_model` it was given."""
    other = tiny_model(seed=1)
    before = bits(other)
    trained(folder, ref_model=other, sync_ref_model=True, ref_model_sync_steps=1)
    return float(not same_bits(bits(other), before))


def buffers_move(folder: Path) -> float:
    """A training forward that writes to a buffer (here: rotary frequencies)."""
    policy = tiny_model()
    meant = naive_log_probs_of(policy, BATCH)
    reference = ExplicitReference.of_policy(policy)
    policy.model.rotary_emb.inv_freq.mul_(3)
    return differs(reference.log_probs(BATCH).values, meant)


def drops_out(folder: Path) -> float:
    """A pass of the reference while the policy is in training mode."""
    policy = lora().train()
    return differs(ImplicitReference(policy).log_probs(BATCH).values, naive_log_probs_of(policy, BATCH))


def trains_a_frozen_factor(folder: Path) -> float:
    """PEFT makes every tensor of an adapter trainable when it is switched on again."""
    policy = half_frozen_lora()
    before = {name: flag.requires_grad for name, flag in policy.named_parameters()}
    ImplicitReference(policy).log_probs(BATCH)
    return float(before != {name: flag.requires_grad for name, flag in policy.named_parameters()})


def leaves_hooks(folder: Path) -> float:
    policy = dropping_gpt2()

    def hooks() -> int:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
        return sum(len(getattr(module, kind)) for module in policy.modules() for kind in kinds)

    before, reference = hooks(), ExplicitReference.before_training(policy)
    for _ in range(3):
        score(policy, BATCH)
        reference.log_probs(BATCH)
    return float(hooks() - before)


def rounds_otherwise_under_autocast(folder: Path) -> float:
    trainer = make_trainer(folder, bf16=True, use_cpu=True, eval_dataset=as_dataset(tiny_pairs(8)))
    return abs(trainer.evaluate()["eval_rewards/chosen"])


def answers_with_trained_weights(folder: Path) -> float:
    """New rows, after a run whose reference was the policy itself before training. Rewards are then 0."""
    trainer = trained(folder, precompute_ref_log_probs=True, learning_rate=0.03)
    return float(abs(trainer.evaluate(as_dataset(tiny_pairs(8, seed=3)))["eval_rewards/chosen"]) < 1e-5)


def reads_another_models_store(folder: Path) -> float:
    """Two models, one store."""
    answers = []
    for seed in (0, 1):
        source = ExplicitReference.before_training(tiny_model(seed=seed))
        reference = PrecomputedReference(LogProbStore(folder / "store.sqlite"), source)
        reference.prepare({"train": lambda: [BATCH]})
        answers.append(reference.log_probs(BATCH).values)
    return differs(answers[1], naive_log_probs_of(tiny_model(seed=1), BATCH))


def stored_by_another(first: Callable[[Path], Any], second: Callable[[Path], Any]) -> Callable[[Path], float]:
    """Two models of the same weights that answer differently, and one store."""

    def fault(folder: Path) -> float:
        store = LogProbStore(folder / "store.sqlite")
        for make in (first, second):
            model = make(folder)
            reference = PrecomputedReference(store, ExplicitReference(model))
            reference.prepare({"train": lambda: [BATCH]})
        return differs(reference.log_probs(BATCH).values, naive_log_probs_of(model, BATCH))

    return fault


def resumed_with_another(first: Callable[[Path], Any], second: Callable[[Path], Any]) -> Callable[[Path], float]:
    """A run against one of them that is resumed against the other."""

    def fault(folder: Path) -> float:
        return resumed_differs(folder, {"ref_model": first(folder)}, lambda: {"ref_model": second(folder)})

    return fault


def plainly(folder: Path) -> Any:
    return tiny_model()


def behaving(name: str) -> Callable[[Path], Any]:
    return lambda folder: odd.with_behaviour(name)


def from_remote_code(scale: float) -> Callable[[Path], Any]:
    return lambda folder: odd.with_remote_code(folder / f"scaled by {scale}", scale)


def given_adapters(change: Callable[[Any], object] = lambda model: None, **options: Any) -> Callable[[Path], Any]:
    """A PEFT model with two trained adapters, changed after it was made."""

    def make(folder: Path) -> Any:
        config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **options)
        model = adapted(tiny_model(), config)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model.add_adapter("second", config)
        change(model)
        return model

    return make


ADAPTERS: dict[str, Callable[[Path], Any]] = {
    "alpha": given_adapters(lora_alpha=24),
    "rsLoRA": given_adapters(use_rslora=True),
    "the active one": given_adapters(lambda model: model.set_adapter("second")),
    "off": given_adapters(lambda model: model.base_model.disable_adapter_layers()),
}


def rows_of_another(folder: Path) -> float:
    """A store without a probe, whose rows another program brought in."""
    model, store = tiny_model(), LogProbStore(folder / "store.sqlite")
    source = ExplicitReference(model)
    wrong = [values.numpy() - 0.1 for values in source.log_probs(BATCH).split()]
    store.put(source.identity.digest, BATCH.keys, wrong)
    reference = PrecomputedReference(store, source)
    reference.prepare({"train": lambda: [BATCH]})
    return differs(reference.log_probs(BATCH).values, naive_log_probs_of(model, BATCH))


def rounds_rotary_frequencies(folder: Path) -> float:
    """`ref_dtype` casts weights; frequencies stay in fp32."""
    policy = tiny_model()
    module: Any = ExplicitReference.of_policy(policy, Placement(dtype=torch.bfloat16)).module
    return float((module.model.rotary_emb.inv_freq - policy.model.rotary_emb.inv_freq).abs().max())


def layers_of_another_model(folder: Path) -> float:
    """Packed attention is switched on in the config of the model; this layer reads another one."""
    model: Any = tiny_model()
    model.model.layers[0] = tiny_model(seed=1).model.layers[0]
    return differs(score(model, BATCH).values.detach(), naive_log_probs_of(model, BATCH))


def rows_of_one_token_above(limit: int) -> PairBatch:
    one = Response(tuple(range(5, 15)), tuple(range(9, limit)))
    return PairBatch.of_pairs([(one, one)])


def scores_as(make: Callable[[], Any], batch: PairBatch = BATCH) -> Callable[[Path], float]:
    """How far a model's scores are from its plain forwards: policy and reference would both be as far off."""

    def fault(folder: Path) -> float:
        model = make()
        with torch.no_grad():
            return differs(score(model, batch).values, naive_log_probs_of(model, batch))

    return fault


def off_in_training(trainer: Any, initial: Any) -> float:
    """The largest error of the reference's answers during training, against plain forwards of the initial policy."""
    said, ask = [], trainer.reference.log_probs

    def listening(batch: Any) -> Any:
        answer = ask(batch)
        said.append((batch, answer.values.clone()))
        return answer

    trainer.reference.log_probs = listening
    trainer.train()
    errors = [float((values - naive_log_probs_of(initial, batch)).abs().max()) for batch, values in said]
    return max(errors) if max(errors) > 2e-5 else 0.0  # the rounding of rows of a hundred tokens


class Varies:
    """A collator that cuts every row one token shorter each time it sees it again."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.truncation, self.seen = collator, collator.truncation, 0

    def __call__(self, rows: Any) -> Any:
        self.seen += 1
        cut = [row | {"chosen_ids": list(row["chosen_ids"])[: -self.seen] or [5]} for row in rows]
        return self.collator(cut)


def lose_the_store(trainer: Any) -> None:
    prune(trainer.reference.store, identity=trainer.reference.identity.digest)


def replace_the_rows(trainer: Any) -> None:
    other = make_trainer(Path(trainer.args.output_dir) / "other", rows=as_dataset(tiny_pairs(24, seed=5)))
    trainer.train_dataset = other.train_dataset


def vary_the_rows(trainer: Any) -> None:
    trainer.data_collator = Varies(trainer.data_collator)


def brought_back(change: Callable[[Any], None]) -> Callable[[Path], float]:
    """Rows that are missing at step 0 and later, after the policy's weights were given up as reference."""

    def fault(folder: Path) -> float:
        initial = tiny_model()
        trainer = make_trainer(
            folder,
            precompute_ref_log_probs=True,
            ref_store=str(folder / "store.sqlite"),
            learning_rate=0.03,
            max_steps=4,
        )
        change(trainer)
        return off_in_training(trainer, initial)

    return fault


def long_rows() -> PairBatch:
    ids = [tuple(torch.randint(5, 250, (120,), generator=torch.Generator().manual_seed(s)).tolist()) for s in range(3)]
    return PairBatch.of_pairs([(Response(ids[0], ids[1]), Response(ids[0], ids[2][:60]))])


def prompts_that_begin_alike() -> PairBatch:
    one = long_rows().responses()[0]
    other = one._replace(prompt_ids=one.prompt_ids[:60] + one.token_ids[:9])
    return PairBatch.of_pairs([(one, one._replace(token_ids=one.token_ids[5:])), (other, other)])


def changed_after_it_was_proven() -> Any:
    model = tiny_model()
    score(model, BATCH)
    model.model.layers[0].register_forward_hook(lambda _, __, out: out + 0.1 * out.cumsum(1))
    return model


def trained_activated_adapter() -> Any:
    calls = BATCH.responses()[0].prompt_ids[:1]
    model = odd.activated(calls)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def longer_rows_than_were_proven() -> Any:
    model = odd.windowed_beyond_64()
    score(model, BATCH)
    return model


def sees_later_tokens(folder: Path) -> float:
    """How far a token moves the predictions before it, in a model that is trained nevertheless."""
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    score(model, BATCH)
    one, other = (model(torch.tensor([[5, 6, 7, last]])).logits[0, :3] for last in (8, 9))
    return differs(one, other)


def changed_after(use: Callable[[Any], object], folder: Path) -> float:
    """A policy that changes after the trainer was used once: the reference is another model than it starts from."""
    trainer = make_trainer(folder, max_steps=2, learning_rate=0.03, eval_dataset=as_dataset(tiny_pairs(4, seed=3)))
    use(trainer)
    if trainer.state.global_step == 0:
        train(trainer.model)
    initial = copy.deepcopy(trainer.model)
    return off_in_training(trainer, initial)


def predict(trainer: Any) -> None:
    trainer.predict(trainer.eval_dataset)


def wrong_behind_the_first_batch(folder: Path) -> float:
    """Stored answers of another model, for all rows but those of the first batch."""
    options = {"precompute_ref_log_probs": True, "ref_store": str(folder / "s.sqlite"), "max_steps": 4}
    options |= {"train_sampling_strategy": "sequential", "ref_store_verify": 0}
    trainer = make_trainer(folder, **options)
    rows = trainer.train_dataset
    batch = batch_of(trainer.data_collator([rows[row] for row in range(4, len(rows))]))
    other = ExplicitReference(tiny_model(seed=1)).log_probs(batch).split()
    store, own = trainer.reference.store, trainer.reference.identity
    prune(store, identity=own.digest)
    store.put(own.digest, batch.keys, [np.asarray(values) for values in other], description=own.describe())
    return off_in_training(make_trainer(folder, **options), tiny_model())


def given_by_another_model(folder: Path) -> float:
    """Rows that bring sums of another model, as if they were the policy's."""
    trainer = make_trainer(folder, tiny_model(seed=1))
    rows = with_reference_columns(trainer.train_dataset, trainer.reference, trainer.data_collator)
    return distance_from_start(trained(folder, rows=rows, max_steps=1))


def prompt_in_another_column(folder: Path) -> float:
    """Rows whose prompt is in a column that is not read: the tokens that the model then does not see."""
    pairs = [row | {"chosen": f" So {row['chosen']}", "rejected": f" So {row['rejected']}"} for row in tiny_pairs(4)]
    rows = [{"question": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in pairs]
    read, meant = (len(make_trainer(folder, rows=given).train_dataset[0]["prompt_ids"]) for given in (rows, pairs))
    return float(meant - read)


def sums_of_another_max_length(folder: Path) -> float:
    """Rows that were scored with another `max_length`, of a reference that is not the policy at the start."""
    exporting = make_trainer(folder, max_length=60)
    rows = with_reference_columns(exporting.train_dataset, exporting.reference, exporting.data_collator)
    return distance_from_start(trained(folder, rows=rows, max_length=40, ref_columns="other", max_steps=1))


def sums_of_another_max_length_in_one_row(folder: Path) -> float:
    rows = [row | {"chosen": "Yes.", "rejected": "No."} for row in tiny_pairs(120)]
    rows[57] |= {"chosen": tiny_pairs(1)[0]["chosen"] * 3}
    exporting = make_trainer(folder, rows=rows)
    given = with_reference_columns(exporting.train_dataset, exporting.reference, exporting.data_collator)
    given = given.remove_columns([REFERENCE_CHECKSUM])  # as another program writes them
    still = {"learning_rate": 0.0, "max_steps": -1, "num_train_epochs": 1, "max_length": 60}
    return max(abs(loss - LOG_2) for loss in curve(trained(folder, rows=given, **still)))


KEY = b"0" * 16


def a_changed_export(folder: Path) -> float:
    """A number in a Parquet file that is whole as a Parquet file."""
    folder.mkdir()
    file = folder / "scores.parquet"
    with LogProbStore(folder / "a.sqlite") as store:
        store.put("me", [KEY], [np.array([-1.0], np.float32)])
        export_parquet(store, file, "me")
    table, about = pq.read_table(file), pq.ParquetFile(file).metadata.metadata
    rows = [row | {"log_probs": [-3.0]} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema.with_metadata(about)), file)
    with LogProbStore(folder / "b.sqlite") as store:
        import_parquet(store, file)
        (found,) = store.get("me", [KEY], [1])
        assert found is not None
        return abs(float(found[0]) + 1.0)


def a_trigger(folder: Path) -> float:
    """One that empties a store when the next reference comes."""
    with LogProbStore(folder / "a.sqlite") as store:
        store.put("me", [KEY], [np.array([-1.0], np.float32)])
        with closing(sqlite3.connect(store.path)) as db:
            db.executescript("CREATE TRIGGER t AFTER INSERT ON identities BEGIN DELETE FROM records; END")
        store.put("other", [KEY], [np.array([-1.0], np.float32)])
        return 1.0 - store.count("me")


def a_log_prob_above_zero(folder: Path) -> float:
    with LogProbStore(folder / "a.sqlite") as store:
        store.put("me", [KEY], [np.array([5.0], np.float32)])
        return 5.0 * store.count()


def new_rows_of_the_embedding(folder: Path) -> float:
    """Embeddings of two tokens that only one row has change before training."""
    rows = tiny_pairs(24)
    rows[9] = rows[9] | {"chosen": rows[9]["chosen"] + "\u00ff"}
    trainer = make_trainer(folder, rows=rows, train_sampling_strategy="sequential", max_steps=3)
    largest = max(max(row["chosen_ids"]) for row in trainer.train_dataset)
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[largest] *= -3
    return off_in_training(trainer, copy.deepcopy(trainer.model))


def evaluated_with_the_adapter_off(folder: Path) -> float:
    """The user switches the adapter off around an evaluation; the reference is the adapter as it started."""
    policy = adapted(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    meant = naive_log_probs_of(policy, BATCH)
    trainer = make_trainer(folder, policy, eval_dataset=as_dataset(tiny_pairs(4)), max_steps=1)
    trainer.train()
    with trainer.model.disable_adapter():
        trainer.evaluate()
        return differs(trainer.reference.log_probs(BATCH).values, meant)


def compiled(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def by_default(model: Any) -> Any:
    """Each layer's forward inside a function that has it as a default."""
    for layer in model.model.layers:

        def forward(*args: Any, _own: Any = layer.forward, **options: Any) -> Any:
            return _own(*args, **options)

        layer.forward = forward
    return model


def by_closure(model: Any) -> Any:
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = functools.update_wrapper(functools.partial(lambda module, x: own(x), mlp), own)
    return model


def by_a_hook(model: Any) -> Any:
    first, second = (layer.mlp for layer in model.model.layers[:2])
    first.register_forward_hook(lambda module, inputs, output: output + second(inputs[0]))
    return model


def inside_an_object(model: Any) -> Any:
    mlp = model.model.layers[0].mlp
    held = {"forward": mlp.forward}
    mlp.forward = lambda x: held["forward"](x)
    return model


def fresh_lora(model: Any) -> Any:
    return adapted(model, LoraConfig(r=4, target_modules=["q_proj"]))


def continued_lora(model: Any) -> Any:
    return adapted(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))


def unfrozen_later(freeze: Callable[[Any], Any], folder: Path, **options: Any) -> float:
    """What was frozen when the trainer was built trains after all. No save, no evaluation."""
    policy = freeze(tiny_model(tie_word_embeddings=True))
    initial = copy.deepcopy(policy)
    trainer = make_trainer(folder, policy, **{"max_steps": 3, "learning_rate": 0.03} | options)
    policy.requires_grad_(True)
    return off_in_training(trainer, initial)


def stored_on_the_way(folder: Path) -> dict[str, Any]:
    return {"precompute_ref_log_probs": True, "ref_store_mode": "lazy", "ref_store": str(folder / "store.sqlite")}


def unfrozen_and_resumed(folder: Path) -> float:
    """The checkpoint's weights are read into what the reference shared."""

    def unfrozen(num_steps: int) -> Any:
        trainer = make_trainer(folder, fresh_lora(tiny_model()), **RUN | {"max_steps": num_steps})
        trainer.model.requires_grad_(True)
        return trainer

    unfrozen(2).train()
    resumed = unfrozen(4)
    resumed.train = functools.partial(resumed.train, resume_from_checkpoint=str(folder / "checkpoint-2"))
    return off_in_training(resumed, tiny_model())


def changed_and_unfrozen(folder: Path) -> float:
    policy = fresh_lora(tiny_model())
    trainer = make_trainer(folder, policy)
    without_a_trace(policy.get_base_model().model.layers[0].mlp.up_proj.weight)
    policy.requires_grad_(True)
    return off_in_training(trainer, tiny_model())


def with_frozen_layers(policy: Any) -> Any:
    policy.model.layers.requires_grad_(False)
    return policy


class Does(TrainerCallback):
    def __init__(self, change: Callable[[], object]) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.change()


def changed_by_its_owner(change: Callable[[Any], object], folder: Path) -> float:
    other = tiny_model(seed=1)
    callbacks = [Does(lambda: change(other.model.layers[0].mlp.up_proj.weight))]
    return off_in_training(make_trainer(folder, ref_model=other, callbacks=callbacks, max_steps=4), tiny_model(seed=1))


def in_place(weight: Any) -> None:
    with torch.no_grad():
        weight.mul_(3)


def without_a_trace(weight: Any) -> None:
    weight.data.mul_(3)


def stored_of_a_changed_model(folder: Path) -> float:
    """A row that is scored into the store after the owner of `ref_model` changed it."""
    other = tiny_model(seed=1)
    trainer = make_trainer(folder, ref_model=other, precompute_ref_log_probs=True, ref_store_mode="lazy")
    without_a_trace(other.model.layers[0].mlp.up_proj.weight)
    answer = trainer.reference.log_probs(BATCH).values
    return differs(answer, naive_log_probs_of(tiny_model(seed=1), BATCH))


def by_another_tensor(weight: Any) -> None:
    weight.data = weight.data * 3


def rows_that_no_watched_pair_has(folder: Path) -> float:
    """The base's embedding of all ids but those of the pairs that are scored again; saved at every step."""
    policy = fresh_lora(tiny_model())
    embedding = policy.get_base_model().model.embed_tokens.weight
    rows = tiny_pairs(24)
    trainer = make_trainer(folder, policy, rows, max_steps=4, save_strategy="steps", save_steps=1)
    seen = {i for row in trainer.train_dataset.take(2) for name in TOKEN_COLUMNS for i in row[name]}
    others = [i for i in range(len(embedding)) if i not in seen]

    def change() -> None:
        embedding.data[others] *= -3

    trainer.add_callback(Does(change))
    return off_in_training(trainer, tiny_model())


class Unfreezes(TrainerCallback):
    """A layer joins training after the first step, in a fused optimizer: its steps leave no version behind."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            layer = list(model.model.layers[0].requires_grad_(True).parameters())
            kwargs["optimizer"].add_param_group({"params": layer, "lr": 0.03, "initial_lr": 0.03})
            kwargs["lr_scheduler"].base_lrs.append(0.03)
            kwargs["lr_scheduler"].lr_lambdas.append(lambda step: 1.0)


def unfrozen_step_by_step(folder: Path) -> float:
    policy = with_frozen_layers(tiny_model())
    options: dict[str, Any] = {"optim": "adamw_torch_fused", "max_steps": 4, "callbacks": [Unfreezes()]}
    return off_in_training(make_trainer(folder, policy, **options), with_frozen_layers(tiny_model()))


class Decays(torch.optim.SGD):
    """Decays all that it holds, also what has no gradient."""

    def step(self, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.8)
        return super().step(*args, **options)


def decayed_base(folder: Path) -> float:
    policy = fresh_lora(tiny_model())
    optimizer = Decays(policy.parameters(), lr=0.01)
    return off_in_training(make_trainer(folder, policy, optimizers=(optimizer, None)), tiny_model())


class Centered(torch.nn.Module):
    """A layer that takes the running mean of its inputs away, as normalisation by batch does."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("num_batches", torch.tensor(0))

    def forward(self, x: Any) -> Any:
        if self.training:
            self.num_batches += 1
            self.mean.lerp_(x.detach().mean().reshape(1) + 1, 0.5)
        return self.inner(x - self.mean)


def centered(model: Any) -> Any:
    model.model.layers[0].mlp = Centered(model.model.layers[0].mlp)
    return model


def running_means(folder: Path) -> float:
    trainer = make_trainer(folder, fresh_lora(centered(tiny_model())))
    return off_in_training(trainer, centered(tiny_model()))


def a_hook_on_the_base(hook: Callable[..., Any], folder: Path) -> float:
    policy = fresh_lora(tiny_model())
    mlp = policy.get_base_model().model.layers[0].mlp
    callbacks = [Does(lambda: mlp.register_forward_hook(hook))]
    return off_in_training(make_trainer(folder, policy, callbacks=callbacks, max_steps=4), tiny_model())


def layer_of(model: Any) -> Any:
    return model.get_base_model().model.layers[0]


def flip_rows(model: Any) -> None:
    """The sum of all bytes stays the same."""
    rows = model.get_base_model().model.embed_tokens.weight.data
    rows[10:200] = rows[10:200].flip(0)


def load_another(model: Any) -> None:
    model.load_state_dict(fresh_lora(tiny_model(seed=3)).state_dict())


def scale_the_adapter(model: Any) -> None:
    for layer in model.get_base_model().model.layers:
        layer.self_attn.q_proj.scaling["default"] *= 3


def with_doubled_weights(model: Any) -> None:
    torch.nn.utils.parametrize.register_parametrization(layer_of(model).mlp.up_proj, "weight", Doubled())


class Doubled(torch.nn.Module):
    def forward(self, weight: Any) -> Any:
        return 2 * weight


SHARED_CHANGES: dict[str, Callable[[Any], object]] = {
    "rows that change places": flip_rows,
    "other weights are loaded": load_another,
    "another module": lambda model: setattr(layer_of(model), "mlp", tiny_model(seed=3).model.layers[0].mlp),
    "a parametrization": with_doubled_weights,
    "a buffer that is not saved": lambda model: model.get_base_model().model.rotary_emb.inv_freq.data.mul_(3),
    "the adapter's scaling": scale_the_adapter,
    "a function on a module": lambda model: setattr(layer_of(model).mlp, "forward", torch.tanh),
}


def shared_changes(change: Callable[[Any], object], folder: Path, **options: Any) -> float:
    """The base, the modules or the adapter's options change in training: policy and reference share them."""
    policy = continued_lora(tiny_model())
    initial = copy.deepcopy(policy)
    callbacks = [Does(lambda: change(policy))]
    return off_in_training(make_trainer(folder, policy, callbacks=callbacks, max_steps=4, **options), initial)


def patched_class(folder: Path) -> float:
    """A method patched for every module of a class, the reference's own among them."""
    policy = tiny_model()
    kind: Any = type(policy.model.layers[0].mlp)
    plain, initial = kind.forward, naive_of_a_copy(policy)
    with pytest.MonkeyPatch.context() as patch:
        change = Does(lambda: patch.setattr(kind, "forward", lambda self, x: 2 * plain(self, x)))
        trainer = make_trainer(folder, policy, callbacks=[change], max_steps=4)
        trainer.train()
        return differs(trainer.reference.log_probs(BATCH).values, initial)


def naive_of_a_copy(policy: Any) -> torch.Tensor:
    return naive_log_probs_of(copy.deepcopy(policy), BATCH)


def doubles(module: Any, inputs: Any, output: Any) -> Any:
    return 2 * output


def given_away(change: Callable[[Any], object], folder: Path) -> float:
    """Whoever has `trainer.ref_model` changes it, as synchronizing by hand does."""
    trainer = make_trainer(folder, max_steps=4)
    trainer.add_callback(Does(lambda: change(trainer.ref_model)))
    return off_in_training(trainer, tiny_model())


def another_adapter(folder: Path) -> float:
    policy = adapted(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        policy.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    initial = copy.deepcopy(policy)
    trainer = make_trainer(folder, policy)
    policy.set_adapter("second")
    return off_in_training(trainer, initial)


def spread_of_tokens(scores: Any, options: Any) -> torch.Tensor:
    """A loss that single tokens decide, whatever their sum."""
    return scores.tokens.chosen.sums(scores.tokens.chosen.reference.square()) + 0 * scores.delta


spread_of_tokens.needs_tokens = True  # type: ignore[attr-defined]


def tokens_of_sums(folder: Path) -> float:
    """How far such a loss is off where the rows bring sums."""
    whole = make_trainer(folder, loss=spread_of_tokens)
    rows = with_reference_columns(whole.train_dataset, whole.reference, whole.data_collator)
    of_sums = make_trainer(folder, rows=rows, loss=spread_of_tokens)
    losses = [trainer.evaluate(rows)["eval_loss"] for trainer, rows in ((whole, whole.train_dataset), (of_sums, rows))]
    return abs(losses[0] - losses[1]) / losses[0]


# ------------------------------------------------------------------------------- the protections, and their loss


@dataclass(frozen=True)
class Protection:
    """A fault, how to take away what protects from it, and the error it raises (where it is not put right)."""

    fault: Callable[[Path], float]
    remove: Callable[[pytest.MonkeyPatch], None]
    error: type[Exception] | None = None
    silent: float = 0.01  # what the fault gives, at least, once nothing protects from it


def no_gap_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.watch, "check_initial_gap", lambda *_: None)


def know_sums_as_tokens(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.config.rules.reference, "_given", lambda facts: ())


def reload_by_name(patch: pytest.MonkeyPatch) -> None:
    """As a leading trainer does."""

    def of_policy(policy: Any, *_: Any) -> ExplicitReference:
        model: Any = AutoModelForCausalLM.from_pretrained(policy.config._name_or_path)
        return ExplicitReference(model, means_policy=True)

    patch.setattr(ExplicitReference, "of_policy", of_policy)


def copy_nothing(patch: pytest.MonkeyPatch) -> None:
    twin = tether.reference.explicit.frozen_twin
    patch.setattr(
        tether.reference.explicit, "frozen_twin", lambda model, owns, *rest: twin(model, lambda p: False, *rest)
    )


def share_buffers(patch: pytest.MonkeyPatch) -> None:
    twin = tether.reference.explicit.frozen_twin

    def shared(model: Any, *rest: Any) -> Any:
        made = twin(model, *rest)
        for own, theirs in zip(made.modules(), model.modules(), strict=True):
            for name, buffer in theirs.named_buffers(recurse=False):
                setattr(own, name, buffer)
        return made

    patch.setattr(tether.reference.explicit, "frozen_twin", shared)


def cast_everything(patch: pytest.MonkeyPatch) -> None:
    twin = tether.reference.explicit.frozen_twin
    patch.setattr(
        tether.reference.explicit, "frozen_twin", lambda model, owns, dtype=None, *rest: twin(model, owns).to(dtype)
    )


def exchange_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ImplicitReference, "_exchanged", lambda self: nullcontext())


def always_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.implicit, "has_zero_delta", lambda policy, without: True)


def plain_disable(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def off(policy: Any) -> Iterator[None]:
        with policy.disable_adapter():
            yield

    patch.setattr(tether.reference.implicit, "adapter_off", off)


def no_evaluation_mode(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.base, "evaluation_mode", lambda model: nullcontext())


def keep_hooks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda self: None)


def no_autocast(patch: pytest.MonkeyPatch) -> None:
    plain = tether.reference.base.score_without_gradient
    patch.setattr(
        tether.reference.explicit, "score_without_gradient", lambda model, batch, _: plain(model, batch, None)
    )
    no_gap_check(patch)


def one_identity(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReferenceIdentity, "digest", property(lambda self: "0" * 32))


def never_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ExplicitReference, "release", lambda self: None)
    look_at_no_held_tensor(patch)
    write_all_the_same(patch)


def no_state(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SynchronizedReference, "save", lambda self, folder: None)
    patch.setattr(SynchronizedReference, "load", lambda self, folder: None)


def move_what_was_given(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ExplicitReference, "_refuse_given", lambda self, name: None)
    look_at_no_held_tensor(patch)
    build = ExplicitReference.of_other_model.__func__  # type: ignore[attr-defined]
    patch.setattr(
        ExplicitReference,
        "of_other_model",
        classmethod(lambda cls, *args, moves=False, **options: build(cls, *args, **options)),
    )


def drop(check: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Without one of the checks of a checkpoint."""
    return lambda patch: patch.setattr(tether.trainer.run_saving, check, lambda *_, **__: None)


no_identity_check = drop("check_reference")


def digest_no_adapter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.explicit, "adapter_settings", lambda model: None)
    one_identity(patch)
    compare_nothing(patch)


def compare_nothing(patch: pytest.MonkeyPatch) -> None:
    """Equal weights are taken for equal answers."""
    patch.setattr(tether.reference.store_checks.StoreChecks, "look_at", lambda *_: None)
    patch.setattr(tether.reference.probing.RunProbes, "check", lambda *_: None)


def no_drift_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.watch.ReferenceWatch, "check_drift", lambda *_, **__: None)
    look_at_no_held_tensor(patch)


def look_at_no_held_tensor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.shared.SharedWatch, "keep_what_trains", lambda *_: None)
    patch.setattr(tether.reference.shared.SharedWatch, "check", lambda *_, **__: None)


def write_all_the_same(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.held.HeldTensors, "changed", lambda self: [])


def share_what_is_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.implicit, "_written_buffers", lambda policy: [])
    look_at_no_held_tensor(patch)


def forget_the_active_adapter(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def in_policy(self: Any) -> Iterator[None]:
        with self._exchanged():
            yield

    patch.setattr(ImplicitReference, "in_policy", in_policy)
    look_at_no_held_tensor(patch)


def no_sharing_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.config.rules.reference, "_ref_model", lambda facts: ())


def prove_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tether.scoring.proof._proofs", {})
    patch.setattr("tether.scoring.proof._first_that_works", lambda trials, ways: (ways[0], "", trials.length))


def trust_names(patch: pytest.MonkeyPatch) -> None:
    """Nothing is proven, and an adapter that reads its row is not known by its option either."""
    prove_nothing(patch)
    patch.setattr("tether.scoring.packing.reads_rows", lambda adapter: False)


def prove_once(patch: pytest.MonkeyPatch) -> None:
    """What was proven of a model's class holds whatever comes later."""
    patch.setattr("tether.scoring.proof._proofs", {})
    patch.setattr("tether.scoring.proof.fingerprint", lambda model: Fingerprint((type(model),), ()))


def prove_short(patch: pytest.MonkeyPatch) -> None:
    """What was proven of short rows holds for long ones."""
    patch.setattr("tether.scoring.proof._proofs", {})
    patch.setattr("tether.scoring.proof.proven_length", lambda longest, limit: 10**6)
    patch.setattr("tether.scoring.trial.probe_of", _short)


def _short(batch: PairBatch, length: int, *args: Any, **options: Any) -> Any:
    longest = max(batch.fed_lengths())
    return probe_of(batch, longest, *args, **options)._replace(length=10**6)


def prove_each_prompt_apart(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tether.scoring.proof._proofs", {})
    patch.setattr("tether.scoring.probe._sharing", lambda batch, num: replace(batch, prefixes=()))


def forget_the_limit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tether.scoring.forward.rotary_limit", lambda model: None)


def trust_padding(patch: pytest.MonkeyPatch) -> None:
    """What cannot be packed is padded, without another look."""
    patch.setattr("tether.scoring.proof._proofs", {})
    patch.setattr("tether.scoring.proof._first_that_works", lambda trials, ways: (_padded(ways), "", trials.length))


def _padded(ways: Any) -> Any:
    return next(way for way in ways if way.layout == "padded")


def share_what_is_brought_back(patch: pytest.MonkeyPatch) -> None:
    twin = tether.reference.explicit.frozen_twin
    patch.setattr(ExplicitReference, "_twin_of", lambda self, origin: twin(origin.load(), lambda p: False))


def disarm_the_gap_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.watch.ReferenceWatch, "begin", lambda self: None)
    look_at_the_first_batch_alone(patch)
    gap = tether.reference.watch.ReferenceWatch.gap_at_start

    def once(self: Any, *args: Any, **options: Any) -> Any:
        return {} if self._gaps_known else gap(self, *args, **options)

    patch.setattr(tether.reference.watch.ReferenceWatch, "gap_at_start", once)


def look_at_the_first_batch_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.watch.ReferenceWatch, "check_rows", lambda *_: None)


def take_given_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.data.datasets, "check_reference", lambda *_: None)


def take_the_common_start(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.data.rows, "_check_has_prompt", lambda *_: None)


def look_at_no_longest_row(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.trainer.reference_run, "pair_lengths", lambda *_: np.zeros(1))


def prove_no_export(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.store.exchange, "_prove", lambda *_: None)


def obey_triggers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.store.schema, "check", lambda *_: None)


def store_any_number(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.store.record, "_ROUNDING", float("inf"))


def leave_the_adapter_off(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.implicit, "adapter_on", lambda policy: nullcontext())
    no_drift_check(patch)


def rebind_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(tether.reference.twin, "rebind", lambda model, twin: None)


def also(*removals: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def remove(patch: pytest.MonkeyPatch) -> None:
        for removal in removals:
            removal(patch)

    return remove


def frozen(policy: Any) -> Reference:
    return ExplicitReference.of_policy(policy)


def prompts() -> Any:
    return adapted(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


PROTECTIONS: dict[str, Protection] = {
    # the policy at step 0
    "copied in memory, not loaded by name": Protection(changed_in_memory, also(reload_by_name, no_gap_check)),
    "what trains is copied": Protection(lambda _: moves_with_training(frozen, tiny_model()), copy_nothing),
    "tied weights are copied": Protection(
        lambda _: moves_with_training(frozen, tiny_model(tie_word_embeddings=True)), copy_nothing
    ),
    "buffers are copied": Protection(buffers_move, share_buffers),
    "buffers keep their dtype": Protection(rounds_rotary_frequencies, cast_everything, silent=1e-5),
    "trained biases are exchanged": Protection(
        lambda _: moves_with_training(ImplicitReference, lora(bias="all")), exchange_nothing
    ),
    "a continued adapter is kept": Protection(
        lambda _: moves_with_training(ImplicitReference, lora(init_lora_weights=False)), exchange_nothing
    ),
    "an adapter is off only if it changes nothing: continued": Protection(
        lambda _: is_not_the_policy(ImplicitReference, lora(init_lora_weights=False)), always_off
    ),
    "an adapter is off only if it changes nothing: PiSSA": Protection(
        lambda _: is_not_the_policy(ImplicitReference, llama_lora(init_lora_weights="pissa")), always_off
    ),
    "an adapter is off only if it changes nothing: prompts": Protection(
        lambda _: is_not_the_policy(ImplicitReference, prompts()), always_off
    ),
    # no trace
    "the pass is in evaluation mode": Protection(drops_out, no_evaluation_mode),
    "the pass is under the policy's autocast": Protection(rounds_otherwise_under_autocast, no_autocast, silent=1e-5),
    "what trains stays what trains": Protection(trains_a_frozen_factor, plain_disable, silent=1),
    "hooks are taken off": Protection(leaves_hooks, keep_hooks, silent=3),
    "packed only where it is proven": Protection(layers_of_another_model, prove_nothing),
    "a registered attention is kept": Protection(scores_as(odd.own_attention), prove_nothing),
    "another class of attention is kept": Protection(scores_as(odd.own_attention_class), prove_nothing),
    "a patched attention is kept": Protection(scores_as(odd.patched_on_the_instance), prove_nothing),
    "a module may mix positions": Protection(scores_as(odd.mixes_neighbours), prove_nothing),
    "a hook may depend on positions": Protection(scores_as(odd.late_tokens_steered), prove_nothing),
    "a hook may change the logits": Protection(scores_as(odd.cooled_logits), prove_nothing),
    "a change after the proof is seen": Protection(scores_as(changed_after_it_was_proven), prove_once),
    "an adapter may read its row": Protection(scores_as(trained_activated_adapter), trust_names),
    "rows are proven at their length": Protection(scores_as(longer_rows_than_were_proven, long_rows()), prove_short),
    "prompts that begin alike are proven": Protection(
        scores_as(odd.lost_in_a_tree, prompts_that_begin_alike()), prove_each_prompt_apart
    ),
    "a row just above a limit of frequencies is fed whole": Protection(
        scores_as(lambda: tiny_model("llama", **ROPES["longrope"]), rows_of_one_token_above(LIMIT)), forget_the_limit
    ),
    "padding is proven too": Protection(
        scores_as(lambda: odd.small("glm_moe_dsa", index_topk=8), long_rows()), trust_padding
    ),
    "a model sees no later token": Protection(sees_later_tokens, prove_nothing, ConfigurationError),
    # functions on the model
    "a compiled forward is the copy's own": Protection(
        lambda _: moves_with_training(frozen, compiled(tiny_model())), rebind_nothing
    ),
    "a wrapped forward is the copy's own: default": Protection(
        lambda _: moves_with_training(frozen, by_default(tiny_model())), rebind_nothing
    ),
    "a wrapped forward is the copy's own: closure": Protection(
        lambda _: moves_with_training(frozen, by_closure(tiny_model())), rebind_nothing
    ),
    "a hook is the copy's own": Protection(
        lambda _: moves_with_training(frozen, by_a_hook(tiny_model())), rebind_nothing
    ),
    "what cannot be the copy's own is refused": Protection(
        lambda _: moves_with_training(frozen, inside_an_object(tiny_model())), rebind_nothing, ReferenceModelError
    ),
    # a reference model
    "what is shared and trains is copied": Protection(shares_with_the_policy, copy_nothing),
    "sums are no tokens": Protection(tokens_of_sums, know_sums_as_tokens, ConfigurationError),
    "the policy is no reference model": Protection(is_the_policy, no_sharing_check, ConfigurationError),
    "what follows is a copy": Protection(callers_model_moves, move_what_was_given, silent=1),
    # stored
    "records are found by identity": Protection(reads_another_models_store, also(one_identity, compare_nothing)),
    "released weights do not answer": Protection(
        answers_with_trained_weights, never_release, MissingLogProbsError, silent=1
    ),
    "what is brought back is a copy: lost store": Protection(brought_back(lose_the_store), share_what_is_brought_back),
    "what is brought back is a copy: other rows": Protection(
        brought_back(replace_the_rows), share_what_is_brought_back
    ),
    "what is brought back is a copy: rows that vary": Protection(
        brought_back(vary_the_rows), share_what_is_brought_back
    ),
    "stored rows are scored again": Protection(rows_of_another, compare_nothing, StoreError),
    "an export is proven record by record": Protection(a_changed_export, prove_no_export, StoreError, silent=2),
    "no trigger of a file acts": Protection(a_trigger, obey_triggers, StoreError, silent=1),
    "no log-prob is above 0": Protection(a_log_prob_above_zero, store_any_number, StoreError, silent=5),
    "given sums belong to what is fed": Protection(sums_of_another_max_length, take_given_sums, DataError),
    "the longest row of given sums is looked at": Protection(
        sums_of_another_max_length_in_one_row, look_at_no_longest_row, InitialGapError
    ),
    # the same weights and other answers
    **{
        f"stored by another: {name}": Protection(
            stored_by_another(plainly, behaving(name)), compare_nothing, StoreError, silent=0.1
        )
        for name in odd.BEHAVIOURS
    },
    **{
        f"resumed with another: {name}": Protection(
            resumed_with_another(plainly, behaving(name)), compare_nothing, ResumeError
        )
        for name in odd.BEHAVIOURS
    },
    "stored by another: remote code": Protection(
        stored_by_another(from_remote_code(1.0), from_remote_code(0.5)), compare_nothing, StoreError, silent=0.1
    ),
    "resumed with another: remote code": Protection(
        resumed_with_another(from_remote_code(1.0), from_remote_code(0.5)), compare_nothing, ResumeError
    ),
    **{
        f"stored with another adapter: {name}": Protection(
            stored_by_another(given_adapters(), other), digest_no_adapter, silent=0.1
        )
        for name, other in ADAPTERS.items()
    },
    **{
        f"resumed with another adapter: {name}": Protection(
            resumed_with_another(given_adapters(), other), also(no_identity_check, compare_nothing), ResumeError
        )
        for name, other in ADAPTERS.items()
    },
    # checks
    "the gap is checked": Protection(changed_in_between, no_gap_check, InitialGapError),
    "an evaluation does not use the gap check up": Protection(
        lambda folder: changed_after(lambda trainer: trainer.evaluate(), folder), disarm_the_gap_check, InitialGapError
    ),
    "a prediction does not use the gap check up": Protection(
        lambda folder: changed_after(predict, folder), disarm_the_gap_check, InitialGapError
    ),
    "the prompt is read": Protection(prompt_in_another_column, take_the_common_start, DataError),
    "the gap of given sums is checked": Protection(given_by_another_model, no_gap_check, InitialGapError),
    "the gap is checked behind the first batch: stored": Protection(
        wrong_behind_the_first_batch, look_at_the_first_batch_alone, InitialGapError
    ),
    "the gap is checked behind the first batch: new tokens": Protection(
        new_rows_of_the_embedding, look_at_the_first_batch_alone, InitialGapError
    ),
    "the adapter is on, whatever the user does": Protection(evaluated_with_the_adapter_off, leave_the_adapter_off),
    "the drift is checked": Protection(reached_by_training, no_drift_check, DriftError),
    # what others hold
    "what is shared is copied once it trains: layers": Protection(
        lambda folder: unfrozen_later(with_frozen_layers, folder), look_at_no_held_tensor
    ),
    "what is shared is copied once it trains: the base": Protection(
        lambda folder: unfrozen_later(fresh_lora, folder), look_at_no_held_tensor
    ),
    "what is shared is copied once it trains: a continued adapter's base": Protection(
        lambda folder: unfrozen_later(continued_lora, folder), look_at_no_held_tensor
    ),
    "what is shared is copied once it trains: rows scored on the way": Protection(
        lambda folder: unfrozen_later(fresh_lora, folder, **stored_on_the_way(folder)),
        also(look_at_no_held_tensor, write_all_the_same),
    ),
    "what is shared is copied once it trains: step by step": Protection(unfrozen_step_by_step, look_at_no_held_tensor),
    "what is shared is copied once it trains: resumed": Protection(unfrozen_and_resumed, no_drift_check),
    "what has changed cannot be copied": Protection(changed_and_unfrozen, look_at_no_held_tensor, DriftError),
    "what moves cannot begin to share in training": Protection(
        lambda folder: unfrozen_later(with_frozen_layers, folder, sync_ref_model=True, ref_model_sync_steps=100),
        look_at_no_held_tensor,
        DriftError,
    ),
    "the owner's changes are seen: in place": Protection(
        lambda folder: changed_by_its_owner(in_place, folder), look_at_no_held_tensor, DriftError
    ),
    "the owner's changes are seen: without a trace": Protection(
        lambda folder: changed_by_its_owner(without_a_trace, folder), look_at_no_held_tensor, DriftError
    ),
    "the owner's changes are seen: another tensor": Protection(
        lambda folder: changed_by_its_owner(by_another_tensor, folder), look_at_no_held_tensor, DriftError
    ),
    "a changed source does not write": Protection(stored_of_a_changed_model, write_all_the_same, DriftError),
    "every byte is read": Protection(rows_that_no_watched_pair_has, look_at_no_held_tensor, DriftError),
    "the base stays as it is": Protection(decayed_base, look_at_no_held_tensor, DriftError),
    "a hook on the base is seen": Protection(
        lambda folder: a_hook_on_the_base(lambda module, inputs, output: 3 * output, folder),
        look_at_no_held_tensor,
        DriftError,
    ),
    **{
        f"what is shared is watched: {name}": Protection(
            functools.partial(shared_changes, change), look_at_no_held_tensor, DriftError
        )
        for name, change in SHARED_CHANGES.items()
    },
    "what is shared is watched: behind a store": Protection(
        lambda folder: shared_changes(SHARED_CHANGES["a function on a module"], folder, **stored_on_the_way(folder)),
        also(look_at_no_held_tensor, write_all_the_same),
        DriftError,
    ),
    "a method patched for a class is seen": Protection(patched_class, look_at_no_held_tensor, DriftError),
    "what `ref_model` gives away is watched: weights": Protection(
        lambda folder: given_away(lambda model: model.lm_head.weight.data.mul_(1.5), folder),
        look_at_no_held_tensor,
        DriftError,
    ),
    "what `ref_model` gives away is watched: hooks": Protection(
        lambda folder: given_away(
            lambda model: model.lm_head.register_forward_hook(lambda *given: 2 * given[2]), folder
        ),
        look_at_no_held_tensor,
        DriftError,
    ),
    "running means are exchanged": Protection(running_means, share_what_is_written),
    "the reference's adapter is the active one": Protection(another_adapter, forget_the_active_adapter, DriftError),
    "resumed from the checkpoint's weights": Protection(
        resumed_from_its_own_weights, also(no_identity_check, compare_nothing), ResumeError
    ),
    "resumed with another adapter": Protection(
        resumed_with_another_adapter, also(no_identity_check, compare_nothing), ResumeError
    ),
    "resumed with another alpha of the adapter that trains": Protection(
        resumed_with_another_alpha, drop("check_same_adapters"), ResumeError
    ),
    "resumed with a damaged reference": Protection(
        resumed_with_a_damaged_reference, also(drop("check_files"), compare_nothing), ResumeError
    ),
    "resumed with another beta": Protection(
        resumed_with_another_beta, drop("check_same_run"), ResumeError, silent=1e-4
    ),
    "resumed in another order of rows": Protection(
        resumed_in_another_order, drop("check_same_run"), ResumeError, silent=1e-4
    ),
    "a synchronized reference is saved": Protection(
        resumed_while_following, also(no_state, compare_nothing), silent=1e-4
    ),
}


# A resume takes five seconds; of those that differ in what makes the reference answer otherwise, two stand for all.
RESUMES = [name for name in PROTECTIONS if name.startswith(("resumed with another:", "resumed with another adapter:"))]
SLOW = {*RESUMES} - {"resumed with another: a steering hook", "resumed with another adapter: alpha"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in PROTECTIONS]
)
def test_without_its_protection_the_fault_is_silent(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    protection = PROTECTIONS[name]
    if protection.error is None:
        assert protection.fault(tmp_path / "protected") == 0
    else:
        with pytest.raises(protection.error):
            protection.fault(tmp_path / "protected")
    with monkeypatch.context() as patch:
        protection.remove(patch)
        assert protection.fault(tmp_path / "bare") >= protection.silent


def test_a_hook_that_only_looks_stops_no_run(tmp_path: Path) -> None:
    assert a_hook_on_the_base(lambda module, inputs, output: None, tmp_path) == 0


@pytest.mark.parametrize("name", ["a function on a module", "a buffer that is not saved", "the adapter's scaling"])
def test_what_changes_between_building_and_training_is_said(name: str, tmp_path: Path, caplog: Any) -> None:
    """Policy and reference share it, so there is no gap."""
    policy = continued_lora(tiny_model())
    trainer = make_trainer(tmp_path, policy, max_steps=1)
    SHARED_CHANGES[name](policy)
    trainer.train()
    assert distance_from_start(trainer) == 0
    (said,) = [record.message for record in caplog.records if "changed since the trainer was built" in record.message]
    assert "`base_model.model.model." in said


def test_a_copy_that_is_taken_late_is_said(tmp_path: Path, caplog: Any) -> None:
    unfrozen_later(fresh_lora, tmp_path)
    (said,) = [record.message for record in caplog.records if "keeps its own copy" in record.message]
    assert "(0.1 MB) of 20 tensors" in said
