"""Routers: which experts a token meets, and with which weights.

Every statistic that decides or balances is of the global batch, so that no layout changes it.

Shape legend: B batch, T length, N = B T tokens, M tokens of the global batch, C hidden size, E experts,
K experts of a token, Z tasks.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from triptych.kernels import hash_normal, string_key, without_autocast
from triptych.models import balancing
from triptych.models.assignment import NOWHERE, best_tokens, first_come, top_experts
from triptych.models.balancing import RoutingSums, add_up
from triptych.models.config import ModelConfig
from triptych.models.context import Context, has_values
from triptych.models.init import ZEROS, Init
from triptych.models.linear import unset
from triptych.models.moe_config import RouterConfig
from triptych.models.norms import wide
from triptych.models.sharding import GlobalBatch, Shards

EXPERTS_AT_MOST = 1 << 20
"""Noise is drawn at token * this + expert, so that appended experts leave that of the others alone."""


class Routing(NamedTuple):
    """experts: int64 (N, K), -1 for none. weights: (N, K), 0 for none. surrogate: a scalar for
    `balancing.attach`, or None."""

    experts: torch.Tensor
    weights: torch.Tensor
    surrogate: torch.Tensor | None


class Decision(NamedTuple):
    """What recomputation repeats. chosen: int64 (N, K), before capacity drops any; experts: after.
    gradient: of the losses by the flat global sums, where there are losses."""

    chosen: torch.Tensor
    experts: torch.Tensor
    gradient: torch.Tensor | None


class Router(nn.Module):
    """Gates of one layer. weight: (E, C), or (Z, E, C) per task; fp32 at least.

    expert_bias: (E,), sigmoid only: added to the scores for the choice alone, moved by `update`.

    What parallel/ and training/ set and read:
    ahead: flat global sums (models/balancing.py) where a pass over all micro-batches has found them; None: a
    forward pass is the global batch, and its sums are added up over `batch`. collecting: this is such a pass
    ahead. observing: record in eval mode too. record: this rank's flat sums since `take_record`. one_pass:
    why the global batch must be one forward pass, if it must.
    """

    balanced = True

    def __init__(
        self,
        config: ModelConfig,
        settings: RouterConfig,
        layer: int,
        num_experts: int,
        name: str,
        costs: tuple[float, ...] | None = None,
    ) -> None:
        """name: distinguishes the routers of a layer. costs: of a token in each expert; None: all alike."""
        super().__init__()
        tasks = config.task_names
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        shape = (num_experts, config.hidden_size)
        self.settings = settings
        self.name = f"{layer}.{name}"
        self.salt = string_key(0, f"{self.name}.router")
        self.num_experts, self.tasks = num_experts, tasks
        self.visible = tuple(settings.visible.get(task, num_experts) for task in tasks)
        self.costs = (1.0,) * num_experts if costs is None else costs
        self.noise_std = 1 / num_experts if settings.noise_std is None else settings.noise_std
        by_expert = settings.router == "expert_choice"
        usual = settings.top_k > 1 and not by_expert
        self.normalize = usual if settings.normalize is None else settings.normalize
        self.one_pass = one_pass(settings)
        self.weight = unset(*((len(tasks), *shape) if settings.per_task else shape), dtype=dtype)
        self.weight_init = ZEROS if settings.per_task else config.linear_init(*shape)
        self.expert_bias: nn.Parameter | None = None
        if settings.router == "sigmoid":
            self.expert_bias = nn.Parameter(unset(num_experts, dtype=dtype), requires_grad=False)
        self.batch = GlobalBatch()
        self.shards = Shards()
        self.ahead: torch.Tensor | None = None
        self.record: torch.Tensor | None = None
        self.collecting = False
        self.observing = False

    def init(self) -> dict[str, Init]:
        biases: dict[str, Init] = {} if self.expert_bias is None else {"expert_bias": ZEROS}
        return {"weight": self.weight_init} | biases

    def flops(self, length: int) -> int:
        """Forward FLOPs of one sequence."""
        return 2 * length * self.num_experts * self.weight.shape[-1]

    def active_parameters(self) -> int:
        """Those that a token meets: of its task."""
        return self.num_experts * (self.weight.shape[-1] + (self.expert_bias is not None))

    def forward(self, x_BTC: torch.Tensor, context: Context) -> Routing:
        """Where the tokens go. The same on every tp rank; `surrogate` on the first one alone."""
        tasks_B = context.tasks
        if tasks_B is None:
            tasks_B = torch.zeros(x_BTC.shape[0], dtype=torch.int64, device=x_BTC.device)
        logits_BTE = gate_logits(x_BTC, self.weight, tasks_B, self._column_ends())
        noisy_BTE = self._with_noise(logits_BTE, context)
        scores_BTE = self._scores(noisy_BTE, tasks_B)
        decision = context.routing.get(self.name)
        again = decision is not None
        if decision is None:
            decision = self._decide(scores_BTE.detach(), tasks_B, context.padding)
        sums = self._sums(logits_BTE, noisy_BTE, scores_BTE, tasks_B, decision, context.padding, again)
        if sums is not None and not again:
            decision = decision._replace(gradient=self._take_in(sums.flatten().detach()))
        if torch.is_grad_enabled() and self.training:
            context.routing[self.name] = decision
        surrogate = None
        if sums is not None and decision.gradient is not None and self.shards.start == 0:
            surrogate = (decision.gradient * sums.flatten()).sum()
        return Routing(decision.experts, self._weights(scores_BTE, decision), surrogate)

    # ---- scores

    def _column_ends(self) -> list[int]:
        """Experts up to which some task sees; the logits up to each are one product."""
        return sorted({*self.visible, self.num_experts})

    def _with_noise(self, logits_BTE: torch.Tensor, context: Context) -> torch.Tensor:
        keys = context.sample_keys
        if self.settings.router != "noisy" or not self.training or keys is None:
            return logits_BTE
        _, T, E = logits_BTE.shape
        tokens = torch.arange(T, device=logits_BTE.device).unsqueeze(1)
        places_TE = tokens * EXPERTS_AT_MOST + torch.arange(E, device=logits_BTE.device)
        noise = hash_normal((keys ^ self.salt).view(-1, 1, 1), places_TE)
        return logits_BTE + self.noise_std * noise.to(logits_BTE.dtype)

    def _scores(self, logits_BTE: torch.Tensor, tasks_B: torch.Tensor) -> torch.Tensor:
        """Of each expert, >= 0: probabilities, or sigmoids; 0 for those that the row's task does not see.

        A softmax is over so many experts as the task sees, so that those appended behind change no bit.
        """
        score = torch.sigmoid if self.settings.router == "sigmoid" else _softmax
        if min(self.visible) == self.num_experts:
            return score(logits_BTE)
        seen_B11 = self._seen(tasks_B).view(-1, 1, 1)
        scores_BTE = torch.zeros_like(logits_BTE)
        for count in sorted(set(self.visible)):
            # Contiguous, as strides too have a say in the bits.
            seen_BTe = score(logits_BTE[..., :count].contiguous())
            padded_BTE = F.pad(seen_BTe, (0, self.num_experts - count))
            scores_BTE = torch.where(seen_B11 == count, padded_BTE, scores_BTE)
        return scores_BTE

    def _seen(self, tasks_B: torch.Tensor) -> torch.Tensor:
        """int64 (B,): experts that the row's task sees."""
        return torch.tensor(self.visible, device=tasks_B.device)[tasks_B]

    def _hide(self, values_BTE: torch.Tensor, tasks_B: torch.Tensor) -> torch.Tensor:
        """-inf for experts that the row's task does not see."""
        if min(self.visible) == self.num_experts:
            return values_BTE
        experts_E = torch.arange(self.num_experts, device=tasks_B.device)
        return values_BTE.masked_fill(experts_E >= self._seen(tasks_B).view(-1, 1, 1), -torch.inf)

    def _weights(self, scores_BTE: torch.Tensor, decision: Decision) -> torch.Tensor:
        """(N, K): scores of the chosen, scaled; 0 for what capacity dropped, without a change of the
        others."""
        chosen_NK, experts_NK = decision.chosen, decision.experts
        weights_NK = scores_BTE.flatten(0, 1).gather(1, chosen_NK.clamp_min(0))
        if self.normalize:
            weights_NK = shares(torch.where(chosen_NK != NOWHERE, weights_NK, 0))
        return torch.where(experts_NK != NOWHERE, weights_NK * self.settings.scale, 0)

    # ---- decisions

    @torch.no_grad()
    def _decide(
        self, scores_BTE: torch.Tensor, tasks_B: torch.Tensor, padding_BT: torch.Tensor | None
    ) -> Decision:
        settings = self.settings
        choice_BTE = scores_BTE if self.expert_bias is None else scores_BTE + self.expert_bias
        choice_BTE = self._hide(choice_BTE, tasks_B)
        if padding_BT is not None:
            choice_BTE = choice_BTE.masked_fill(padding_BT.unsqueeze(-1), -torch.inf)
        if settings.router == "expert_choice":
            chosen_NK = self._chosen_by_experts(choice_BTE)
            return Decision(chosen_NK, chosen_NK, None)
        chosen_NK = top_experts(choice_BTE.flatten(0, 1), settings.top_k)
        if settings.routing == "capacity" and self.training:
            best_N = scores_BTE.amax(-1).flatten()
            return Decision(chosen_NK, self._within_capacity(chosen_NK, best_N), None)
        return Decision(chosen_NK, chosen_NK, None)

    def _capacity(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens that an expert takes, int64, of so many in the batch."""
        settings = self.settings
        share = settings.capacity_factor * settings.top_k * tokens.double() / self.num_experts
        return share.ceil().long().clamp_min(settings.min_capacity)

    def _within_capacity(self, chosen_NK: torch.Tensor, best_N: torch.Tensor) -> torch.Tensor:
        """Choices that find room in the global batch."""
        chosen_MK, best_M = self.batch.gather(chosen_NK), self.batch.gather(best_N)
        capacity = self._capacity((chosen_MK[:, 0] != NOWHERE).sum())
        kept_NK = self._own(first_come(chosen_MK, best_M, capacity), chosen_NK.shape[0])
        return torch.where(kept_NK, chosen_NK, NOWHERE)

    def _chosen_by_experts(self, choice_BTE: torch.Tensor) -> torch.Tensor:
        """(N, K), K: experts of the token that has most of them. In training they choose from the global
        batch; else from each row, so that no row's output depends on its neighbours."""
        B, T, E = choice_BTE.shape
        groups_GME = self.batch.gather(choice_BTE.flatten(0, 1)).unsqueeze(0) if self.training else choice_BTE
        tokens_G = (groups_GME > -torch.inf).any(-1).sum(-1)
        taken = best_tokens(groups_GME, self._capacity(tokens_G)).flatten(0, 1)
        taken_NE = self._own(taken, B * T) if self.training else taken
        most = max(1, int(taken_NE.sum(-1).max())) if has_values(taken_NE) else E
        experts_NE = torch.where(taken_NE, torch.arange(E, device=taken.device), NOWHERE)
        return experts_NE.sort(dim=-1, descending=True).values[:, :most].contiguous()

    def _own(self, of_all: torch.Tensor, size: int) -> torch.Tensor:
        return of_all[self.batch.rank * size : (self.batch.rank + 1) * size]

    # ---- sums

    def _sums(
        self,
        logits_BTE: torch.Tensor,
        noisy_BTE: torch.Tensor,
        scores_BTE: torch.Tensor,
        tasks_B: torch.Tensor,
        decision: Decision,
        padding_BT: torch.Tensor | None,
        again: bool,
    ) -> RoutingSums | None:
        """Of the tokens here; None where nobody wants them. With a graph only for losses."""
        training = self.training and torch.is_grad_enabled()
        learning = training and not self.collecting and balancing.weighs(self.settings.losses)
        recording = (training or self.collecting or self.observing) and not again
        if not (learning or recording):
            return None
        with torch.set_grad_enabled(learning):
            p_BTE = scores_BTE if noisy_BTE is logits_BTE else self._scores(logits_BTE, tasks_B)
            if self.settings.router == "sigmoid":
                p_BTE = shares(p_BTE)
            z_BT1 = self._hide(logits_BTE, tasks_B).logsumexp(-1, keepdim=True).square()
            smooth_BTE = self._smooth(logits_BTE, noisy_BTE, tasks_B, decision)
            if padding_BT is not None:
                keep_BT1 = ~padding_BT.unsqueeze(-1)
                p_BTE, z_BT1, smooth_BTE = (torch.where(keep_BT1, t, 0) for t in (p_BTE, z_BT1, smooth_BTE))
            return add_up(
                p_BTE,
                z_BT1,
                smooth_BTE,
                chosen_NK=decision.chosen,
                experts_NK=decision.experts,
                tasks_B=tasks_B,
                padding_BT=padding_BT,
                num_tasks=len(self.tasks),
            )

    def _smooth(
        self, logits_BTE: torch.Tensor, noisy_BTE: torch.Tensor, tasks_B: torch.Tensor, decision: Decision
    ) -> torch.Tensor:
        """Probability that each expert is among the K best if its noise is drawn again (V-MoE, arXiv
        2106.05974, appendix A.2): Phi((logit - threshold) / std), threshold: the K-th largest noisy logit."""
        if self.settings.losses.load == 0:
            return torch.zeros_like(logits_BTE)
        last_BT1 = decision.chosen[:, -1].clamp_min(0).view(*logits_BTE.shape[:2], 1)
        threshold_BT1 = noisy_BTE.gather(-1, last_BT1)
        return torch.special.ndtr((self._hide(logits_BTE, tasks_B) - threshold_BT1) / self.noise_std)

    def _take_in(self, flat: torch.Tensor) -> torch.Tensor | None:
        """Adds this pass's sums to the record. Returns the losses' gradient by the global sums, if it is
        wanted."""
        self.record = flat if self.record is None else self.record + flat
        losses = self.settings.losses
        if self.collecting or not (self.training and torch.is_grad_enabled()) or not balancing.weighs(losses):
            return None
        whole = self.batch.sum(flat) if self.ahead is None else self.ahead
        return balancing.gradient(losses, whole, len(self.tasks), self.num_experts, self._costs(whole))

    def _costs(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.costs, dtype=torch.float64, device=like.device)

    # ---- between steps

    def take_record(self) -> torch.Tensor:
        """float64 (RoutingSums.size,): what this rank added up since the last call; zeros for nothing."""
        record, self.record = self.record, None
        if record is None:
            size = RoutingSums.size(len(self.tasks), self.num_experts)
            record = torch.zeros(size, dtype=torch.float64, device=self.weight.device)
        return record

    def bias_step(self, record_global: torch.Tensor) -> torch.Tensor | None:
        """(E,), by which `update` moves expert_bias: up by bias_rate where an expert got less than the mean,
        down where more (arXiv 2408.15664, algorithm 1); None without such a bias."""
        if self.expert_bias is None:
            return None
        load_E = self._unflatten(record_global).load
        return self.settings.bias_rate * torch.sign(load_E.mean() - load_E)

    @torch.no_grad()
    def update(self, record_global: torch.Tensor) -> None:
        """After an optimizer step, with the summed records of all ranks."""
        step_E = self.bias_step(record_global)
        if step_E is not None and self.expert_bias is not None:
            self.expert_bias.add_(step_E.to(self.expert_bias.dtype))

    @torch.no_grad()
    def figures(self, record_global: torch.Tensor) -> dict[str, Any]:
        """{"load": shares of the choices, float64 (E,), "dropped": share of them, "entropy": per token, in
        nats, "losses": {name: value without its weight}, "task_load": {task: shares, (E,)}}; on the CPU."""
        record_global = record_global.cpu()
        sums = self._unflatten(record_global)
        choices = sums.load.sum().clamp_min(1)
        values = balancing.losses(self.settings.losses, sums, self._costs(record_global))
        task_load = sums.task_load / sums.task_load.sum(1, keepdim=True).clamp_min(1)
        return {
            "load": sums.load / choices,
            "dropped": float(sums.dropped / choices),
            "entropy": float(sums.entropy / sums.tokens.clamp_min(1)),
            "losses": {name: float(value) for name, value in values.items()},
            "task_load": dict(zip(self.tasks, task_load)),
        }

    def _unflatten(self, flat: torch.Tensor) -> RoutingSums:
        return RoutingSums.unflatten(flat, len(self.tasks), self.num_experts)


@without_autocast
def gate_logits(
    x_BTC: torch.Tensor, weight: torch.Tensor, tasks_B: torch.Tensor, ends: list[int]
) -> torch.Tensor:
    """(B, T, E) = x weight[task]ᵀ in fp32 at least, one product for the experts up to each of `ends`.

    weight: (E, C), or (Z, E, C). The bits of a product depend on its sizes; so experts that are appended
    behind others get one of their own.
    """
    x_BTC, parts = wide(x_BTC), []
    for first, end in itertools.pairwise([0, *ends]):
        part = weight[..., first:end, :].to(x_BTC.dtype)
        if weight.ndim == 3:
            parts.append(torch.bmm(x_BTC, part.index_select(0, tasks_B).mT))
        else:
            parts.append(F.linear(x_BTC, part))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def shares(x: torch.Tensor) -> torch.Tensor:
    """x / sum(x) over the last dim, for x >= 0; zeros stay zeros."""
    total = x.sum(-1, keepdim=True)
    return x / torch.where(total > 0, total, 1)


def one_pass(settings: RouterConfig) -> str | None:
    """Why the global batch must be one forward pass, if it must."""
    if settings.router == "expert_choice":
        return "router=expert_choice lets experts choose from the whole global batch"
    if settings.routing == "capacity":
        return "routing=capacity fills experts by the order of the whole global batch"
    return None


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return x.softmax(-1)
