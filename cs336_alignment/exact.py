"""Enumeration: when every response can be listed, the RLHF objective has a closed form and nothing is sampled.

The last dimension of every tensor enumerates the Y possible responses to one prompt; leading dimensions (...)
are prompts. Policies come in and go out as log-probabilities. Lecture 09 derives the equations.
The source of the optimum: Peters & Schaal 2007; Korbak et al. 2022 (arXiv 2205.11275); Rafailov et al. 2023
(arXiv 2305.18290), appendix A.1.
"""

import math

import torch
from torch import Tensor

from cs336_alignment.tokens import at_least_float32


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}: without a KL penalty the optimum is not a softmax")


def log_partition(ref_log_probs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z(x) = log sum_y pi_ref(y|x) exp(r(x,y) / beta) (equation 9.3).

    ref_log_probs, rewards: (..., Y) -> (...). A response with pi_ref = 0 adds nothing, whatever its reward.
    Raises: ValueError if beta <= 0.
    """
    return _tilted(ref_log_probs, rewards, beta).logsumexp(dim=-1)


def optimal_policy(ref_log_probs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi*(y|x) = log pi_ref(y|x) + r(x,y) / beta - log Z(x), the maximizer of `objective` (equation 9.4).

    ref_log_probs, rewards: (..., Y) -> (..., Y).
    Raises: ValueError if beta <= 0.
    """
    return _tilted(ref_log_probs, rewards, beta).log_softmax(dim=-1)


def _tilted(ref_log_probs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    _check_beta(beta)
    ref_log_probs, rewards = at_least_float32(ref_log_probs), at_least_float32(rewards)
    # Where pi_ref = 0 the reward is replaced, so that -inf + inf cannot arise.
    impossible = ref_log_probs == -math.inf
    return ref_log_probs + torch.where(impossible, 0.0, rewards) / beta


def kl_divergence(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """KL(pi || pi_ref) = sum_y pi(y) (log pi(y) - log pi_ref(y)) (equation 9.2).

    (..., Y), (..., Y) -> (...). A response with pi = 0 adds 0; pi > 0 where pi_ref = 0 gives inf.
    """
    log_probs, ref_log_probs = at_least_float32(log_probs), at_least_float32(ref_log_probs)
    probs = log_probs.exp()
    # Where pi is 0, or underflows to it, the difference may be infinite or NaN, and 0 times that is NaN.
    difference = torch.where(probs > 0, log_probs - ref_log_probs, 0.0)
    return (probs * difference).sum(dim=-1)


def objective(log_probs: Tensor, ref_log_probs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref), the quantity that RLHF maximizes (equation 9.1).

    All (..., Y) -> (...). A response with pi = 0 adds 0, whatever its reward; pi > 0 where pi_ref = 0 makes
    it -inf. Differentiable: its gradient is the exact policy gradient, the one that sampling estimates.
    Raises: ValueError if beta <= 0.
    """
    _check_beta(beta)
    log_probs, rewards = at_least_float32(log_probs), at_least_float32(rewards)
    probs = log_probs.exp()
    reward = (probs * torch.where(probs > 0, rewards, 0.0)).sum(dim=-1)
    return reward - beta * kl_divergence(log_probs, ref_log_probs)


# --------------------------------------------------------------------------------------- the town's corner
#
# A response to a corner prompt is a path in a tree: at the root and at each of its 12 + 144 inner nodes the policy
# chooses one of 12 words or the end; the third word ends the response by itself. So a policy on the corner is 157
# distributions over 13 actions for each prompt, whether a network computes them or a table holds them.


def response_table(node_log_probs: Tensor) -> Tensor:
    """Log-probability of every response from those of the actions at every node.

    node_log_probs: (prompts, 157, 13), the nodes being the root, 12 first words, 144 pairs; the last action is
    the end. Returns (prompts, 1885): the empty response, 12 of one word, 144 of two, 1,728 of three.
    """
    prompts, _, actions = node_log_probs.shape
    n = actions - 1
    root, first, second = node_log_probs.split([1, n, n * n], dim=1)
    one = root[:, 0, :n]
    two = one.unsqueeze(2) + first[:, :, :n]
    three = two.unsqueeze(3) + second[:, :, :n].view(prompts, n, n, n)
    return torch.cat(
        [
            root[:, 0, n:],
            one + first[:, :, n],
            two.flatten(1) + second[:, :, n],
            three.flatten(1),
        ],
        dim=1,
    )


def corner_log_probs(model, corner=None) -> Tensor:
    """log pi(y|x) of every response to every corner prompt, (prompts, Y), with gradient; rows sum to 1.

    The policy is the model restricted to the corner's 13 actions and renormalised. One forward over the whole
    prefix tree gives everything: a 4-D mask lets each node see its prompt, its ancestors and itself.
    model: a model of the town. corner: a `world.Corner`, by default that of the standard world.
    """
    if corner is None:
        from cs336_alignment.world import World  # the one arrow upward, so that one argument is enough

        corner = World().corner()
    return response_table(corner_node_log_probs(model, corner))


def corner_node_log_probs(model, corner) -> Tensor:
    """Log-probabilities of the 13 actions at each of the 157 nodes, (prompts, 157, 13): see `corner_log_probs`."""
    ids, sees = prefix_tree(corner, next(model.parameters()).device)
    logits = model(ids, attention_mask=sees)
    actions = torch.tensor(corner.action_ids, device=ids.device)
    nodes = slice(len(corner.prompt_ids[0]) - 1, None)  # the root is the prompt's last token
    return logits[:, nodes, actions].float().log_softmax(dim=-1)


def prefix_tree(corner, device: torch.device) -> tuple[Tensor, Tensor]:
    """The corner as one batch: input ids (prompts, S) and a 4-D mask (prompts, 1, S, S).

    A row is a prompt, the 12 first words, and the last words of the 144 pairs. Each sees the prompt and its own
    ancestors, so the model computes at each node what it would compute after that prefix alone.
    """
    prompts = torch.tensor(corner.prompt_ids, device=device)
    words = torch.tensor(corner.action_ids[:-1], device=device)
    n, length = len(words), prompts.shape[1]
    nodes = torch.cat([words, words.repeat(n)])
    ids = torch.cat([prompts, nodes.expand(len(prompts), -1)], dim=1)
    sees = torch.eye(length + n + n * n, dtype=torch.bool, device=device)
    sees[:, :length] = True
    sees[:length, :length] = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    pairs = torch.arange(n * n, device=device)
    sees[length + n + pairs, length + pairs // n] = True  # the pair (a, b) sees its first word a
    return ids, sees.expand(len(prompts), 1, -1, -1)


class TabularPolicy(torch.nn.Module):
    """A corner policy without a network: one free logit for each action at each node.

    It has no capacity limit and no generalisation, so what it cannot reach is the optimiser's or the data's fault.
    """

    def __init__(self, node_log_probs: Tensor):
        """node_log_probs: (prompts, 157, 13), where to start; `corner_node_log_probs` of a model, say."""
        super().__init__()
        self.logits = torch.nn.Parameter(node_log_probs.detach().clone())

    def forward(self) -> Tensor:
        """The table of response log-probabilities, (prompts, Y)."""
        return response_table(self.logits.log_softmax(dim=-1))
