"""One round of the draft-verify loop where every depth drafts several candidates.

Greedy decoding follows the candidate that the trunk would have chosen, while there is one. Sampling
draws the candidates of a node without replacement and verifies them in that order, each like a
single draft, with the distributions that the rejected candidates leave (Jeon et al. 2024, arXiv
2402.14160, section 3.2; with replacement: SpecInfer, arXiv 2305.09781, algorithm 2):

    accept x_j with probability min(1, p_j(x_j) / q_j(x_j)), else
    p_(j+1) = norm(max(p_j - q_j, 0)),  q_(j+1) = norm(q_j without x_j)

Every step returns a sample of p_j for any q_j, so the output has the trunk's distribution p_1.

Shapes: B rows, P nodes of a depth, W candidates of each, V vocabulary, E tokens of a path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_lightning.decoding.sampling import draw, total
from mtp_lightning.decoding.speculative import Decoder, Round, RowResult
from mtp_lightning.decoding.tree import Tree
from mtp_lightning.decoding.tree_session import TreeSession
from mtp_lightning.decoding.verification import residual
from mtp_lightning.nn.tree_cache import along


class TreeDecoder(Decoder):
    """A :class:`Decoder` that drafts trees."""

    session: TreeSession

    def round(
        self, n_drafts: int, caps: Sequence[int], looked_up: Sequence[Sequence[int]] = ()
    ) -> Round:
        """Draft, verify, accept. The whole tree is drafted unless no row may accept a draft;
        ``caps`` limits the accepted depth."""
        short = [self.session.is_short(row) for row in range(len(caps))]
        depth = self.session.tree.depth
        limits = [0 if s else min(cap, depth) for s, cap in zip(short, caps, strict=True)]
        if not any(limits):
            return super().round(0, limits)
        return self._greedy_tree(limits) if self._sampling.greedy else self._sample_tree(limits)

    def _greedy_tree(self, limits: list[int]) -> Round:
        session, tree = self.session, self.session.tree
        drafts = []
        for k in range(1, tree.depth + 1):
            best_BPW = session.draft_tree(k).topk(tree.widths[k - 1], dim=-1).indices
            drafts.append(best_BPW.flatten(1))
            session.put(drafts[-1], tree.level(k).start)
        logits_BTV = session.verify_tree()
        host = torch.cat((*drafts, logits_BTV.argmax(dim=-1)), dim=1).tolist()
        paths, results = [], []
        for row, limit in zip(host, limits, strict=True):
            draft, choice = [-1, *row[: len(tree)]], row[len(tree) :]
            path = [0]
            while len(path) <= limit:
                children = tree.children(path[-1], len(path) - 1)
                matches = [node for node in children if draft[node] == choice[path[-1]]]
                if not matches:
                    break
                path.append(matches[0])
            paths.append(path)
            results.append(_result(tree, [choice[node] for node in path], path, draft, limit))
        pad = tree.depth + 1
        device = logits_BTV.device
        path_BE = torch.tensor([p + [0] * (pad - len(p)) for p in paths], device=device)
        tokens = [result.tokens + [0] * (pad - len(result.tokens)) for result in results]
        session.put(torch.tensor(tokens, device=device), 1)
        session.accept_path(path_BE, [result.accepted for result in results])
        return Round(results, along(logits_BTV, path_BE))

    def _sample_tree(self, limits: list[int]) -> Round:
        session, tree = self.session, self.session.tree
        noise = self._noise.next()
        drafts: list[Tensor] = []
        proposals = []
        for k in range(1, tree.depth + 1):
            level = tree.level(k)
            noise_BN = noise.draft_BM[:, level.start - 1 : level.stop - 1]
            q_BPV = self._sampling.probabilities(session.draft_tree(k))
            draft_BPW, q_BPWV = draw_without_replacement(
                q_BPV, noise_BN.unflatten(1, (q_BPV.shape[1], tree.widths[k - 1]))
            )
            if drafts:  # nothing follows a candidate that does not exist
                draft_BPW = draft_BPW.masked_fill(drafts[-1].unsqueeze(-1) < 0, -1)
            drafts.append(draft_BPW.flatten(1))
            proposals.append(q_BPWV)
            session.put(drafts[-1].clamp(min=0), level.start)
        logits_BTV = session.verify_tree()
        draft_BN = torch.cat(drafts, dim=1)
        tokens_BE, path_BE, accepted_B = accept_path_or_resample(
            tree,
            self._sampling.probabilities(logits_BTV),
            proposals,
            draft_BN,
            noise.accept_BM,
            noise.final_B,
            torch.tensor(limits, device=logits_BTV.device),
        )
        session.put(tokens_BE, 1)
        host = torch.cat((accepted_B.unsqueeze(1), tokens_BE, path_BE, draft_BN), dim=1).tolist()
        results, width = [], tree.depth + 1
        for (accepted, *row), limit in zip(host, limits, strict=True):
            tokens, path, draft = row[:width], row[width : 2 * width], [-1, *row[2 * width :]]
            valid = slice(accepted + 1)
            results.append(_result(tree, tokens[valid], path[valid], draft, limit))
        session.accept_path(path_BE, [result.accepted for result in results])
        return Round(results, along(logits_BTV, path_BE))


def _result(
    tree: Tree, tokens: list[int], path: list[int], draft: list[int], limit: int
) -> RowResult:
    """The result of a round for one row. ``path`` is node 0 and the accepted nodes, ``draft`` the
    token of every node (-1 for node 0 and for candidates that do not exist), and ``limit`` the
    deepest level that could be accepted."""
    levels = ((depth, node) for depth in range(1, limit + 1) for node in tree.level(depth))
    depths = {node: depth for depth, node in levels if draft[node] >= 0 and node not in path}
    index, parents = {node: i for i, node in enumerate(depths)}, tree.parents()
    rejected = [(depth, draft[node], index.get(parents[node])) for node, depth in depths.items()]
    return RowResult(tokens, len(path) - 1, min(len(path), limit), rejected)


def draw_without_replacement(q_BPV: Tensor, noise_BPW: Tensor) -> tuple[Tensor, Tensor]:
    """Draw W candidates of every node without replacement, by uniform numbers of [0, 1).

    Returns:
        The candidates [B, P, W] in the order of drawing, -1 if no token was left, and the
        distribution that each was drawn from, [B, P, W, V], then all zeros.
    """
    rest_BPV = q_BPV
    drafts, proposals = [], []
    for j in range(noise_BPW.shape[-1]):
        total_BP1 = total(rest_BPV)
        rest_BPV = rest_BPV / total_BP1.masked_fill(total_BP1 == 0, 1)
        draft_BP = draw(rest_BPV, noise_BPW[..., j])
        drafts.append(draft_BP.masked_fill(total_BP1.squeeze(-1) == 0, -1))
        proposals.append(rest_BPV)
        rest_BPV = rest_BPV.scatter(-1, draft_BP.unsqueeze(-1), 0)
    return torch.stack(drafts, dim=-1), torch.stack(proposals, dim=-2)


def accept_path_or_resample(
    tree: Tree,
    p_BTV: Tensor,
    proposals: Sequence[Tensor],
    draft_BN: Tensor,
    accept_noise_BN: Tensor,
    final_noise_B: Tensor,
    limit_B: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rejection rule of a tree.

    Args:
        p_BTV: the trunk's distribution after every node, node 0 included.
        proposals: for every depth, the distributions of its candidates, [B, P, W, V], perhaps over
            the first tokens of the vocabulary alone.
        draft_BN: the candidates of nodes 1 to N; -1 for those that do not exist.
        accept_noise_BN, final_noise_B: uniform numbers of [0, 1).
        limit_B: the deepest level of candidates that are considered.

    Returns:
        Tokens [B, E], of which the first ``accepted + 1`` are valid; the path's nodes [B, E], node
        0 first; and ``accepted`` [B].
    """
    rows = torch.arange(p_BTV.shape[0], device=p_BTV.device)
    node_B, accepted_B = torch.zeros_like(rows), torch.zeros_like(rows)
    p_BV, tokens, path = p_BTV[:, 0], [], [node_B]
    for depth, q_BPWV in enumerate(proposals):
        place_B = (node_B - tree.level(depth).start).clamp(min=0)
        open_B = (accepted_B == depth) & (limit_B > depth)
        advanced_B = torch.zeros_like(open_B)
        for j in range(q_BPWV.shape[2]):
            child_B = tree.level(depth + 1).start + place_B * q_BPWV.shape[2] + j
            token_B = draft_BN[rows, child_B - 1]
            q_BV = q_BPWV[rows, place_B, j]
            q_B, p_B = q_BV[rows, token_B], p_BV[rows, token_B]
            judged_B = open_B & (token_B >= 0)
            ok_B = judged_B & (accept_noise_BN[rows, child_B - 1] * q_B < p_B)
            node_B = torch.where(ok_B, child_B, node_B)
            advanced_B |= ok_B
            open_B = open_B & ~ok_B
            rest_BV = residual(p_BV, q_BV)
            total_B1 = total(rest_BV)
            # If p = q up to rounding, nothing is left to draw from, and p itself is right.
            rejected_B1 = (judged_B & ~ok_B).unsqueeze(1) & (total_B1 > 0)
            p_BV = torch.where(rejected_B1, rest_BV / total_B1.clamp(min=1e-45), p_BV)
        accepted_B = accepted_B + advanced_B
        path.append(node_B)
        tokens.append(draft_BN[rows, (node_B - 1).clamp(min=0)])
        p_BV = torch.where(advanced_B.unsqueeze(1), p_BTV[rows, node_B], p_BV)
    final_B1 = draw(p_BV, final_noise_B).unsqueeze(1)
    tokens_BE = torch.cat((torch.stack(tokens, dim=1), final_B1), dim=1)
    tokens_BE = tokens_BE.scatter(1, accepted_B.unsqueeze(1), final_B1)
    return tokens_BE, torch.stack(path, dim=1), accepted_B
