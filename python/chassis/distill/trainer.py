"""transformers.Trainer with the cross-tokenizer loss: KD and CE normalised over the whole optimizer step.

The number of next-token positions and of chunks is summed over micro-batches and ranks before the first forward pass of a
step, so that neither the gradient nor the printed losses depend on how a batch is cut. For the same reason the dynamic
factor |CE| / |KD| is that of the step before (for the first step, measured ahead); `compat` takes each micro-batch's own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from chassis.distill.fused_head import fused_loss, without_logits
from chassis.distill.teachers import Teacher, batches
from chassis.models import Head
from chassis_kernels import XTokenConfig, xtoken_loss

ADDITIVE = (
    "loss",
    "kl_loss",
    "ce_loss",
    "accuracy",
)  # normalised over the step: their sum over micro-batches is the step's value


class KLScale(TrainerCallback, ExportableState):
    """|CE| / |KD| of the latest step; kept in checkpoints, so that a resumed run goes on with the same factor."""

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def set(self, kd: float, ce: float) -> None:
        self.value = abs(ce) / abs(kd) if kd else 1.0

    def state(self) -> dict:
        return {"args": {"value": self.value}, "attributes": {}}


class DistillTrainer(Trainer):
    """`loss_config` as `xtoken_loss` takes it, one teacher for each of its entries; batches come from `Collator`.

    With the student's `head` the loss is made of its hidden states (`fused_head`), and its logits are never whole.
    """

    def __init__(
        self,
        *args,
        loss_config: XTokenConfig,
        teachers: Sequence[Teacher],
        eval_collator=None,
        warmup_start: float = 0.02,
        head: Head | None = None,
        **options,
    ) -> None:
        super().__init__(*args, **options)
        self.head = head
        self.loss_config, self.teachers, self.warmup_start = loss_config, list(teachers), warmup_start
        self.eval_collator = eval_collator or self.data_collator
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.add_callback(KLScale())
        self._sums: dict[str, Tensor] = {}
        self._steps, self._micro = 0, 0
        self._kd_ce = torch.zeros(2, dtype=torch.float64, device=self.args.device)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp and not self.is_fsdp_enabled:
            # accelerate shards on accelerators alone and would take DDP without a word; fully_shard needs no device.
            state = self.accelerator.state
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            if state.mixed_precision != "no":
                state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
            self.is_fsdp_enabled = True

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples = list(islice(epoch_iterator, num_batches))
        if not samples:
            return samples, None
        counts = self._over_ranks(sum(batch["counts"] for batch in samples).to(device))
        if self.kl_scale.value is None and self._lagged:
            self._measure_scale(samples, counts)
        return samples, counts

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, metrics, logits = self._loss(model, inputs, num_items_in_batch)
        self._remember(metrics)
        # DDP and FSDP average the ranks' gradients; the loss is a share of the whole already.
        loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro += 1
        if self.accelerator.sync_gradients:
            self._end_step()
        return loss

    @property
    def kl_scale(self) -> KLScale:
        """Found anew each time: resuming from a checkpoint replaces it."""
        return next(c for c in self.callback_handler.callbacks if isinstance(c, KLScale))

    @property
    def _lagged(self) -> bool:
        return self.loss_config.dynamic_loss_scaling and not self.loss_config.compat

    def _config(self) -> XTokenConfig:
        if not self._lagged:
            return self.loss_config
        scale = 1.0 if self.kl_scale.value is None else self.kl_scale.value
        return replace(self.loss_config, dynamic_loss_scaling=False, kl_loss_weight=scale, ce_loss_scale=1.0)

    def _loss(self, model, inputs: Mapping, counts: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        with self.compute_loss_context_manager(), batches(self.teachers, inputs) as found:
            found = [t._replace(global_valid_chunks=n) for t, n in zip(found, counts[1:], strict=True)]
            ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            if self.head is not None:
                with without_logits(self.head.unembedding) as hidden:
                    model(**ids, use_cache=False)
                return *fused_loss(self.head, *hidden, *found, self._config(), inputs, counts[0]), None
            logits = model(**ids, use_cache=False).logits
            loss, metrics = xtoken_loss(
                logits,
                found,
                self._config(),
                input_ids=inputs["input_ids"],
                token_mask=inputs["attention_mask"],
                sample_mask=inputs["sample_mask"],
                global_valid_tokens=counts[0],
                group=torch.distributed.group.WORLD if self.args.world_size > 1 else None,
            )
        return loss, metrics, logits

    @torch.no_grad()
    def _measure_scale(self, samples: Sequence[Mapping], counts: Tensor) -> None:
        """The first step's factor: its losses, without a gradient."""
        was_training = self.model.training
        self.model.eval()
        total = torch.zeros_like(self._kd_ce)
        for inputs in samples:
            _, metrics, _ = self._loss(self.model_wrapped, self._prepare_inputs(inputs), counts)
            total += torch.stack([metrics["kl_loss"], metrics["ce_loss"]]).double()
        self.model.train(was_training)
        self.kl_scale.set(*self._over_ranks(total).tolist())

    def _remember(self, metrics: Mapping[str, Tensor]) -> None:
        """Add to the running sums where they are: the device is not waited for."""
        self._kd_ce = self._kd_ce + torch.stack([metrics["kl_loss"], metrics["ce_loss"]]).double()
        found = {name: value for name, value in metrics.items() if name not in ("selected_teacher", "num_valid_samples")}
        if (chosen := metrics.get("selected_teacher")) is not None:
            found |= {f"selected_t{i}": chosen == i for i in range(len(self.teachers))}
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().to(self.args.device, torch.float64)

    def _end_step(self) -> None:
        self._steps += 1
        if self._lagged:
            self.kl_scale.set(*self._over_ranks(self._kd_ce).tolist())
        self._kd_ce = torch.zeros_like(self._kd_ce)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._steps:
            names = sorted(self._sums)
            values = self._over_ranks(torch.stack([self._sums[name] for name in names])).tolist()
            ranks = self.accelerator.num_processes
            for name, value in zip(names, values, strict=True):
                stem = name.rsplit("_t", 1)[0]
                logs[name] = value / (self._steps if stem in ADDITIVE else self._micro * ranks)
            self._sums, self._steps, self._micro = {}, 0, 0
        super().log(logs, start_time)

    def _over_ranks(self, values: Tensor) -> Tensor:
        """Sum over all ranks; in one process the values themselves."""
        return self.accelerator.reduce(values, "sum") if self.args.world_size > 1 else values

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Linear from `warmup_start` of the rate, then a cosine to 0."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            warmup, start = self.args.get_warmup_steps(num_training_steps), self.warmup_start
            rest = max(num_training_steps - warmup, 1)

            def factor(step: int) -> float:
                if step < warmup:
                    return start + (1 - start) * step / warmup
                return 0.5 * (1 + math.cos(math.pi * min(step - warmup, rest) / rest))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return self.lr_scheduler

    def get_eval_dataloader(self, eval_dataset=None):
        """Evaluation samples have a collator of their own: a teacher's cache is of one set of samples."""
        collator, self.data_collator = self.data_collator, self.eval_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Held-out bits per byte, top-1 accuracy of the next token and each teacher's KL; logged under the prefix."""
        loader = self.get_eval_dataloader(eval_dataset)
        was_training = self.model.training
        self.model.eval()
        total = defaultdict(float)
        ones = torch.ones(1 + len(self.teachers), dtype=torch.float64, device=self.args.device)
        for inputs in loader:
            inputs = self._prepare_inputs(inputs)
            _, metrics, _ = self._loss(self.model_wrapped, inputs, ones)
            total["nats"] += metrics["ce_loss"].double()
            total["right"] += metrics["accuracy"].double()
            total["bytes"] += inputs["n_bytes"][inputs["sample_mask"] != 0].sum().double()
            for i, count in enumerate(inputs["counts"]):
                total[f"count{i}"] += count.double()
            for i in range(len(self.teachers)):
                total[f"kl_t{i}"] += metrics.get(f"kl_loss_t{i}", ones.new_zeros(())).double()
        self.model.train(was_training)
        names = sorted(total)
        values = self._over_ranks(torch.stack([torch.as_tensor(total[n]).to(self.args.device) for n in names]))
        found = dict(zip(names, values.tolist(), strict=True))
        results = {
            "bits_per_byte": found["nats"] / math.log(2) / max(found["bytes"], 1),
            "ce_loss": found["nats"] / max(found["count0"], 1),
            "accuracy": found["right"] / max(found["count0"], 1),
        }
        for i in range(len(self.teachers)):
            results[f"kl_loss_t{i}"] = found[f"kl_t{i}"] / max(found[f"count{i + 1}"], 1)
        logs = {f"{metric_key_prefix}_{name}": value for name, value in results.items()}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs
