"""The monitoring callbacks through a real Trainer: what lands in the event file, and which alarms fire."""

import logging
import math
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from callbacks.health import Health
from callbacks.retrieval_panels import RetrievalPanels
from callbacks.run_monitor import RunMonitor
from callbacks.sparsity_monitor import SparsityMonitor
from lightning_modules import Stage2
from lightning_modules.stage import Objective
from stair.errors import SettingError
from stair.grounding import Expansion, Grounding
from stair.metrics import SparsityStats
from stair.vocabulary import Vocabulary

PAIRS = 4


def make_batch(vocabulary, number, padding=()):
    """Four images, two captions each; those in the places `padding` only even out ranks."""
    texts = [
        "a red ball",
        "small dogs",
        "the cat sleeps .",
        "two birds",
        "a tree",
        "sea",
        "green house",
        "photo of cat",
    ]
    ids, mask = vocabulary.tokenize(texts, 12)
    image_id = torch.arange(PAIRS) + PAIRS * number
    image_id[list(padding)] = -1
    g = torch.Generator().manual_seed(number)
    return {
        "pixels": torch.randint(0, 256, (PAIRS, 3, 8, 8), dtype=torch.uint8, generator=g),
        "ids": ids,
        "mask": mask,
        "image_id": image_id,
        "caption_image": image_id.repeat_interleave(2),
        "key": [f"shard-{number}/{i}" for i in range(PAIRS)],
    }


class Data(L.LightningDataModule):
    def __init__(self, vocabulary, batches=6):
        super().__init__()
        self.vocabulary, self.batches = vocabulary, batches
        self.val_names, self.test_names = ["emoji", "photos"], ["held_out"]
        self.skipped = {"undecodable": 3}

    def _loader(self, numbers, **kwargs):
        batches = [make_batch(self.vocabulary, n, **kwargs) for n in numbers]
        return torch.utils.data.DataLoader(batches, batch_size=None)

    def train_dataloader(self):
        return self._loader(range(self.batches))

    def val_dataloader(self):
        if self.trainer.world_size == 1:
            return [self._loader(range(3)), self._loader([3, 4], padding=[1])]
        if self.trainer.global_rank == 0:
            return [self._loader(range(2)), self._loader([3, 4], padding=[1])]
        # the other rank has fewer of the first set and only padding of the second
        return [self._loader([2]), self._loader([5], padding=range(PAIRS))]

    def test_dataloader(self):
        return self._loader(range(2))


class Module(L.LightningModule):
    """Encodes by a fixed table; `says(step)` changes what a training step returns."""

    def __init__(self, vocabulary, says=lambda step: {}):
        super().__init__()
        self.stair = nn.Module()
        self.stair.vocabulary = vocabulary
        self.weight = nn.Parameter(torch.ones(()))
        self.width, self.says = len(vocabulary), says

    def encode(self, batch):
        g = torch.Generator().manual_seed(int(batch["image_id"].max()))
        rows = torch.rand(PAIRS, self.width, generator=g) * (torch.rand(PAIRS, self.width, generator=g) < 0.3)
        texts = torch.rand(2 * PAIRS, self.width, generator=g) * (torch.rand(2 * PAIRS, self.width, generator=g) < 0.2)
        return {"image_BV": rows, "text_CV": texts}

    def training_step(self, batch, batch_idx):
        encoded = self.encode(batch)
        healthy = {
            "loss": self.weight * 1.0,
            "contrastive": torch.tensor(0.7),
            "scale": torch.tensor(1.0),
            "logit_std": torch.tensor(1.0),
            "pairs": PAIRS,
            "image_BV": encoded["image_BV"],
            "text_CV": encoded["text_CV"][:PAIRS],
        }
        return {**healthy, **self.says(self.trainer.global_step)}

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        return self.encode(batch)

    def test_step(self, batch, batch_idx):
        return self.encode(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.fixture(scope="module")
def vocabulary(vocab_file):
    return Vocabulary(vocab_file)


def trainer(folder, *callbacks, logger=TensorBoardLogger, **kwargs):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "log_every_n_steps": 2,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "logger": logger(str(folder), name="", version=""),
    }
    return L.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    found.Reload()
    return found


def scalars(folder):
    found = events(folder)
    return {tag: {e.step: e.value for e in found.Scalars(tag)} for tag in found.Tags()["scalars"]}


def wanted_of(module, batches, k=10):
    stats, grounding, expansion = SparsityStats(module.width), Grounding(module.width, k), Expansion(module.width)
    for batch in batches:
        out, ids = module.encode(batch), (batch["image_id"], batch["caption_image"])
        in_caption_terms = module.stair.vocabulary.in_caption_terms(batch["ids"], batch["mask"])
        stats.update(out["image_BV"], out["text_CV"], *ids)
        grounding.update(out["image_BV"], in_caption_terms, *ids)
        expansion.update(out["text_CV"], in_caption_terms, *ids)
    figures = {"sparsity/": stats, "": grounding, "expansion/": expansion}
    return {f"{kind}{k}": float(v) for kind, metric in figures.items() for k, v in metric.compute().items()}


def check_sets(logged, prefix, name, expected):
    got = {tag.split("/", 2)[2]: values for tag, values in logged.items() if tag.startswith(f"{prefix}/{name}/")}
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert list(got[key].values()) == [pytest.approx(value, rel=1e-5)], key


@pytest.fixture(scope="module")
def run(vocabulary, tmp_path_factory):
    """One run with everything on: its module and its folder."""
    folder = tmp_path_factory.mktemp("run")
    module = Module(vocabulary)
    always_on = SparsityMonitor(), RetrievalPanels(images=6, terms=3), RunMonitor(), Health()
    trainer(folder, *always_on, num_sanity_val_steps=2, val_check_interval=3, limit_val_batches=2).fit(
        module, datamodule=Data(vocabulary)
    )
    return module, folder


def test_training_sparsity_is_that_of_the_logged_step(run, vocabulary):
    module, folder = run
    logged = scalars(folder)
    assert sorted(logged["train/image/active_terms"]) == [1, 3, 5]
    out = module.encode(make_batch(vocabulary, 3))
    assert logged["train/image/active_terms"][3] == pytest.approx(float((out["image_BV"] != 0).sum(1).float().mean()))
    pairs = [(i * t != 0).sum() for i in out["image_BV"] for t in out["text_CV"][:PAIRS]]
    assert logged["train/flops_per_pair"][3] == pytest.approx(float(sum(pairs)) / len(pairs), rel=1e-5)
    assert "train/text/active_terms" in logged


def test_each_validation_set_is_measured_anew_each_time_and_not_in_the_sanity_check(run):
    logged = scalars(run[1])
    for name in ("emoji", "photos"):
        values = logged[f"val/{name}/grounding@10"]
        assert sorted(values) == [2, 5] and len(set(values.values())) == 1


def test_validation_figures_equal_the_metrics_of_the_set(vocabulary, tmp_path):
    module = Module(vocabulary)
    trainer(tmp_path, SparsityMonitor()).validate(module, datamodule=Data(vocabulary), verbose=False)
    logged = scalars(tmp_path)
    check_sets(logged, "val", "emoji", wanted_of(module, [make_batch(vocabulary, n) for n in range(3)]))
    check_sets(logged, "val", "photos", wanted_of(module, [make_batch(vocabulary, n, [1]) for n in (3, 4)]))


def test_test_runs_log_under_test(vocabulary, tmp_path):
    module = Module(vocabulary)
    trainer(tmp_path, SparsityMonitor(terms=4)).test(module, datamodule=Data(vocabulary), verbose=False)
    expected = wanted_of(module, [make_batch(vocabulary, n) for n in range(2)], k=4)
    check_sets(scalars(tmp_path), "test", "held_out", expected)


@pytest.mark.parametrize("kind", ["without_vocabulary", "of_another_width"])
def test_dense_models_are_not_changed_and_the_log_says_so_once(vocabulary, tmp_path, caplog, kind):
    module = Module(vocabulary)
    if kind == "without_vocabulary":
        del module.stair
    else:
        module.width = 20
    dense = {"image_BV": torch.ones(PAIRS, 20), "text_CV": torch.ones(PAIRS, 20)}
    module.says = lambda step: dense
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, SparsityMonitor(), RetrievalPanels(), Health(dense_after=0, every=1)).fit(
            module, datamodule=Data(vocabulary)
        )
    assert set(scalars(tmp_path)) == {"epoch", "health/alarm", "health/skipped_steps"}
    assert set(scalars(tmp_path)["health/alarm"].values()) == {0}
    assert caplog.text.count("SparsityMonitor: the embeddings have no vocabulary") == 1
    assert caplog.text.count("RetrievalPanels: no panels") == 1


def test_panels_show_the_same_images_at_every_validation(run):
    module, folder = run
    found = events(folder)
    assert found.Tags()["images"] == ["val/emoji/panels"]
    pictures = found.Images("val/emoji/panels")
    assert [p.step for p in pictures] == [3, 6]
    assert pictures[0].encoded_image_string == pictures[1].encoded_image_string  # the module does not learn
    (table, _) = found.Tensors("val/emoji/panels/text_summary")
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    assert len(lines) == 2 + 6
    assert lines[2].startswith("| a red ball<br>small dogs |")
    top = module.encode(make_batch(module.stair.vocabulary, 0))["image_BV"][0].topk(3)
    for word, weight in zip(module.stair.vocabulary.tokens_of(top.indices.tolist()), top.values, strict=True):
        assert word.strip("#[]") in lines[2] and f"{weight:.2f}" in lines[2]


def test_panels_escape_words_and_captions(vocabulary, tmp_path, monkeypatch):
    odd = "<script>$a|b_*"
    monkeypatch.setattr(vocabulary, "tokens", [odd] * len(vocabulary))
    trainer(tmp_path, RetrievalPanels(images=1, terms=2)).validate(
        Module(vocabulary), datamodule=Data(vocabulary), verbose=False
    )
    text = events(tmp_path).Tensors("val/emoji/panels/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "<script>" not in text and r"&lt;script&gt;\$a\|b\_\*" in text


def test_panels_do_nothing_with_another_logger(vocabulary, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, RetrievalPanels(), SparsityMonitor(), logger=CSVLogger).fit(
            Module(vocabulary), datamodule=Data(vocabulary)
        )
    assert caplog.text.count("RetrievalPanels: no panels") == 1
    assert "val/emoji/grounding@10" in (tmp_path / "metrics.csv").read_text()


def test_the_pace_of_the_run_is_logged(run):
    logged = scalars(run[1])
    assert not [tag for tag in logged if tag.startswith("run/max_memory")]  # no CUDA here
    assert sorted(logged["run/pairs_per_second"]) == [1, 3, 5]
    for step, seconds in logged["run/seconds_per_step"].items():
        assert logged["run/pairs_per_second"][step] == pytest.approx(PAIRS / seconds, rel=1e-4)
        assert 0 <= logged["run/seconds_waiting"][step] <= seconds
    assert set(logged["run/skipped/undecodable"].values()) == {3}


def test_validation_does_not_count_as_waiting_but_slow_input_does(vocabulary, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("callbacks.run_monitor.time.perf_counter", lambda: now[0])

    class Slow(Module):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            now[0] += 0.25 if self.trainer.training else 100
            return batch

        def training_step(self, batch, batch_idx):
            now[0] += 1
            return super().training_step(batch, batch_idx)

    trainer(tmp_path, RunMonitor(), val_check_interval=1).fit(Slow(vocabulary), datamodule=Data(vocabulary))
    logged = scalars(tmp_path)
    assert set(logged["run/seconds_waiting"].values()) == {0.25}
    assert set(logged["run/seconds_per_step"].values()) == {1.25}
    assert list(logged["run/pairs_per_second"].values()) == [pytest.approx(PAIRS / 1.25)] * 3


def fit(vocabulary, folder, health, says, batches=6, **kwargs):
    trainer(folder, health, limit_val_batches=0, **kwargs).fit(
        Module(vocabulary, says), datamodule=Data(vocabulary, batches)
    )
    return scalars(folder)


@pytest.mark.filterwarnings("error:at step", "error:the first batch")
def test_a_healthy_run_raises_no_alarm(vocabulary, tmp_path):
    logged = fit(vocabulary, tmp_path, Health(patience=1, dense_after=0, every=1), lambda step: {})
    assert logged["health/alarm"] == {1: 0, 3: 0, 5: 0}


@pytest.mark.parametrize(
    ("precision", "cost", "warned"), [("bf16-mixed", 33.0, True), ("bf16-mixed", 0.5, False), ("32-true", 33.0, False)]
)
def test_bf16_where_it_is_slower_is_warned_of(vocabulary, tmp_path, monkeypatch, precision, cost, warned):
    monkeypatch.setattr("callbacks.health.bf16_cost", lambda: cost)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(vocabulary, tmp_path, Health(), lambda step: {}, precision=precision)
    warned_of = [str(w.message) for w in seen if "33 times as long" in str(w.message)]
    assert len(warned_of) == warned and all("--trainer.precision 32-true" in text for text in warned_of)


@pytest.mark.parametrize("every", [1, 4, 10])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(vocabulary, tmp_path, every):
    def says(step):
        return {"loss": torch.tensor(float("nan"), requires_grad=True)} if step == 2 else {}

    with pytest.raises(RuntimeError, match=r"not finite at step 3; the batch of rank 0 was shard-2/0, shard-2/1"):
        fit(vocabulary, tmp_path, Health(every=every, skip=0), says)


def not_a_number(step):
    return {"loss": torch.tensor(float("nan"), requires_grad=True)} if step in (1, 2, 4) else {}


@pytest.mark.filterwarnings("ignore:the loss is not finite")
def test_steps_whose_loss_is_not_finite_are_forgiven_so_many_times_on_end(vocabulary, tmp_path):
    with pytest.warns(UserWarning, match=r"not finite at step 2; .*more than health.skip=2 consecutive") as seen:
        logged = fit(vocabulary, tmp_path / "a", Health(every=1, skip=2), not_a_number)
    assert logged["health/skipped_steps"] == {1: 1, 3: 2, 5: 3}
    assert len([w for w in seen if "not finite" in str(w.message)]) == 3
    monitored = trainer(tmp_path / "b", Health(every=1, skip=1))
    with pytest.raises(RuntimeError, match=r"in 2 consecutive steps; the state without these steps is saved in "):
        monitored.fit(Module(vocabulary, not_a_number), datamodule=Data(vocabulary))
    saved = torch.load(tmp_path / "b" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3 and saved["state_dict"]["weight"].isfinite()


def test_the_pairs_whose_embeddings_are_broken_are_named(vocabulary, tmp_path):
    def says(step):
        broken = torch.ones(PAIRS, 35)
        broken[2, 5] = float("inf")
        return {"image_BV": broken, "loss": torch.tensor(float("nan"), requires_grad=True)}

    with pytest.raises(RuntimeError, match=r"the batch of rank 0 was shard-0/2, in 1 consecutive step"):
        fit(vocabulary, tmp_path, Health(every=1, skip=0), says)


def test_broken_weights_are_not_saved(vocabulary, tmp_path):
    class Breaks(Module):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.weight.data.fill_(float("nan"))

    kept = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1)
    with pytest.raises(RuntimeError, match="weights are not finite at step 2, so no checkpoint is written"):
        trainer(tmp_path, Health(), kept, enable_checkpointing=True).fit(
            Breaks(vocabulary), datamodule=Data(vocabulary)
        )
    (sound,) = (tmp_path / "kept").glob("*")
    assert torch.load(sound, weights_only=True)["state_dict"]["weight"].isfinite()


def empty(side):
    return {"contrastive": torch.tensor(math.log(PAIRS) + 0.005), side: torch.zeros(PAIRS, 35)}


@pytest.mark.parametrize("side", ["image_BV", "text_CV"])
def test_a_dead_run_stops_after_patience(vocabulary, tmp_path, side):
    seen = []

    def says(step):
        seen.append(step)
        return empty(side)

    with pytest.raises(RuntimeError, match=r"run is dead.* for 5 steps, up to step 5.*objective\.flops"):
        fit(vocabulary, tmp_path, Health(patience=5, every=1), says)
    assert seen == list(range(5))


def test_a_run_that_recovers_within_patience_goes_on(vocabulary, tmp_path):
    fit(vocabulary, tmp_path, Health(patience=3, every=1), lambda step: empty("text_CV") if step % 3 else {})


@pytest.mark.filterwarnings("ignore:the loss has been log N")
def test_empty_embeddings_alone_or_chance_alone_are_not_dead(vocabulary, tmp_path):
    nothing, chance = torch.zeros(PAIRS, 35), torch.tensor(math.log(PAIRS))
    for name, output in (("empty", {"image_BV": nothing}), ("chance", {"contrastive": chance})):
        fit(vocabulary, tmp_path / name, Health(patience=1, every=1), lambda step, output=output: output)


def test_a_run_stuck_at_chance_with_words_on_is_warned_of_once_and_alarmed(vocabulary, tmp_path):
    def says(step):
        return {"contrastive": torch.tensor(math.log(PAIRS))} if step < 6 else {}

    with pytest.warns(UserWarning, match="loss has been log N for 3 steps, up to step 3") as seen:
        logged = fit(vocabulary, tmp_path, Health(patience=3, every=1), says, batches=8)
    assert logged["health/alarm"] == {1: 0, 3: 1, 5: 1, 7: 0}
    assert len([w for w in seen if "log N" in str(w.message)]) == 1


def test_wide_first_logits_are_warned_of_once_and_only_on_the_first_step(vocabulary, tmp_path):
    with pytest.warns(UserWarning, match=r"standard deviation 11\.0.*objective\.scale_start to 'measure'"):
        fit(vocabulary, tmp_path / "a", Health(), lambda step: {"logit_std": torch.tensor(11.0 if step == 0 else 1.0)})
    with warnings.catch_warnings(record=True) as later:
        fit(vocabulary, tmp_path / "b", Health(), lambda step: {"logit_std": torch.tensor(11.0 if step else 1.0)})
    assert not [w for w in later if "standard deviation" in str(w.message)]


@pytest.mark.parametrize(("similarity", "warned"), [("cosine", False), ("dot", True)])
def test_wide_first_logits_at_a_kept_scale_are_warned_of_only_where_they_are_dot_products(
    tiny_stair, similarity, warned
):
    tiny_stair.config.similarity = similarity
    stage = Stage2.__new__(Stage2)
    L.LightningModule.__init__(stage)
    stage.stair, stage.objective = tiny_stair, Objective(similarity, "keep")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        Health().check_first_logits(stage, 11.0)
    assert bool([w for w in seen if "raise stair.in_caption_margin" in str(w.message)]) == warned
    assert not [w for w in seen if "'measure'" in str(w.message)]


def test_texts_that_are_dense_without_their_mask_are_seen_under_a_soft_one(vocabulary, tmp_path):
    own = torch.zeros(PAIRS, len(vocabulary))
    own[:, :4] = 2.0

    def says(step):
        return {"text_CV": own, "text_masked": own, "text_full": torch.ones(PAIRS, len(vocabulary)).maximum(own)}

    with pytest.warns(UserWarning, match="100% of the vocabulary"):
        logged = fit(vocabulary, tmp_path, Health(dense_after=2, every=1), says)
    assert logged["health/alarm"][5] == 1
    logged = fit(vocabulary, tmp_path / "b", SparsityMonitor(), says)
    assert set(logged["train/text_full/active_terms"].values()) == {len(vocabulary)}
    assert set(logged["train/text/active_terms"].values()) == {4}
    share = 16 / (16 + len(vocabulary) - 4)
    assert list(logged["train/text_full/in_caption_share"].values()) == pytest.approx([share] * 3)


@pytest.mark.filterwarnings("ignore:the loss is not finite")
def test_skipped_steps_go_on_being_counted(vocabulary, tmp_path):
    before = Health(every=1, skip=2)
    fit(vocabulary, tmp_path / "a", before, not_a_number)
    again = Health(every=1, skip=2)
    again.load_state_dict(before.state_dict())
    assert fit(vocabulary, tmp_path / "b", again, lambda step: {})["health/skipped_steps"] == {1: 3, 3: 3, 5: 3}


def test_a_dense_run_is_warned_of_once_and_the_alarm_is_logged_while_it_is_dense(vocabulary, tmp_path):
    def says(step):
        return {"image_BV": torch.ones(PAIRS, len(vocabulary))} if step < 6 else {}

    with pytest.warns(UserWarning, match="100% of the vocabulary") as seen:
        logged = fit(vocabulary, tmp_path, Health(dense_after=2, every=1), says, batches=8)
    assert logged["health/alarm"] == {1: 0, 3: 1, 5: 1, 7: 0}
    assert len([w for w in seen if "of the vocabulary" in str(w.message)]) == 1


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"every": 0}, {"dense_after": -1}, {"skip": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SettingError) as refused:
        Health(**wrong)
    assert refused.value.setting == f"health.{next(iter(wrong))}"
    with pytest.raises(SettingError) as refused:
        RetrievalPanels(images=-1)
    assert refused.value.setting == "panels.images"


def test_two_ranks_measure_one_set_and_stop_together(vocabulary, tmp_path):
    module = Module(vocabulary)
    two = {"strategy": "ddp_fork", "devices": 2}
    trainer(tmp_path / "a", SparsityMonitor(), RunMonitor(), RetrievalPanels(), Health(), **two).fit(
        module, datamodule=Data(vocabulary)
    )
    logged = scalars(tmp_path / "a")
    check_sets(logged, "val", "emoji", wanted_of(module, [make_batch(vocabulary, n) for n in range(3)]))
    check_sets(logged, "val", "photos", wanted_of(module, [make_batch(vocabulary, n, [1]) for n in (3, 4)]))
    assert set(logged["run/skipped/undecodable"].values()) == {6}

    class OneBreaks(Module):
        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            broken = self.global_rank == 1 and batch_idx == 2
            return {**out, "loss": out["loss"] * float("nan") if broken else out["loss"]}

    with pytest.raises(Exception, match="not finite at step 3; the batch of rank 1 was shard-2/0"):
        trainer(tmp_path / "b", Health(every=1, skip=0), limit_val_batches=0, **two).fit(
            OneBreaks(vocabulary), datamodule=Data(vocabulary)
        )
