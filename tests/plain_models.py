"""Mixtures of experts and other families by hand: which neurons they have, what these do on a text, and what the model
writes when they are changed. Nothing of the package is used: every gate, loop over experts and router is written out."""
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F
from transformers.integrations import moe

silu, gelu, tanh_gelu, relu = F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu
def new_gelu(x): return 0.5*x*(1 + torch.tanh((2/torch.pi)**.5*(x + 0.044715*x**3))) # as google wrote it: other bits in bfloat16


@dataclass(frozen=True)
class Dense:
    "An MLP: what its gate and up projections are called, or the one matrix that holds both, or only the first."
    path: str # of the module with the matrices, below the layer; "" = the layer
    width: int
    act: object = silu
    names: tuple = ("gate_proj", "up_proj", "down_proj")
    @property
    def size(self): return self.width


@dataclass(frozen=True)
class Mixture:
    "The experts of a layer and their router."
    path: str
    router: str
    act: object = silu
    width: int = 24
    count: int = 4
    @property
    def size(self): return self.width*self.count


def alike(*parts): return [list(parts)]*2


swiglu, wi, w123 = Dense("mlp", 64), ("wi_0", "wi_1", "wo"), ("w1", "w3", "w2")
PARTS = { # architecture: the parts of every layer, in the order in which neurons are numbered
    "mixtral": alike(Mixture("mlp.experts", "mlp.gate")),
    "qwen2_moe": alike(Mixture("mlp.experts", "mlp.gate"), Dense("mlp.shared_expert", 40)),
    "qwen3_moe": alike(Mixture("mlp.experts", "mlp.gate")),
    "olmoe": alike(Mixture("mlp.experts", "mlp.gate")),
    "gpt_oss": alike(Mixture("mlp.experts", "mlp.router", None)),
    "deepseek_v3": [[swiglu], [Mixture("mlp.experts", "mlp.gate"), Dense("mlp.shared_experts", 24)]],
    "llama4": [
        [Dense("feed_forward", 64)],
        [Mixture("feed_forward.experts", "feed_forward.router"), Dense("feed_forward.shared_expert", 24)],
    ],
    "gemma4_moe": alike(Dense("mlp", 64, tanh_gelu), Mixture("experts", "router", tanh_gelu)),
    "granite_moe": alike(Mixture("block_sparse_moe.experts", "block_sparse_moe.router")),
    "phi_moe": alike(Mixture("mlp.experts", "mlp.router")),
    "gemma4": alike(Dense("mlp", 64, tanh_gelu)),
    "qwen3_5": alike(swiglu),
    "granite_hybrid": alike(Dense("shared_mlp", 40, silu, ("input_linear", None, "output_linear"))),
    "lfm2": alike(Dense("feed_forward", 256, silu, w123)),
    "mt5": alike(Dense("layer.1.DenseReluDense", 64, new_gelu, wi)) + alike(Dense("layer.2.DenseReluDense", 64, new_gelu, wi)),
    "xglm": alike(Dense("", 64, gelu, ("fc1", "", "fc2"))),
    "opt": alike(Dense("", 64, relu, ("fc1", "", "fc2"))),
    "cohere": alike(swiglu),
    "gpt_neox": alike(Dense("mlp", 64, gelu, ("dense_h_to_4h", "", "dense_4h_to_h"))),
    "phi3": alike(Dense("mlp", 64, silu, ("gate_up_proj", None, "down_proj"))),
}
MIXTURES = [a for a, layers in PARTS.items() if any(isinstance(p, Mixture) for parts in layers for p in parts)]
_stacks = {"opt": ["model.decoder.layers"], "gpt_neox": ["gpt_neox.layers"], "mt5": ["encoder.block", "decoder.block"]}


def layers_of(hf, arch): return [x for name in _stacks.get(arch, ["model.layers"]) for x in hf.get_submodule(name)]
def widths(arch): return [sum(p.size for p in parts) for parts in PARTS[arch]]


def first_of(arch, layer, path):
    "Where the neurons of a part begin in their layer."
    parts = PARTS[arch][layer]
    return sum(p.size for p in parts[:[p.path for p in parts].index(path)])


# The routers, as transformers' models have them, with experts that are `off` taken out and numbers added to logits

def _chosen(scores, keep, k):
    "Values and numbers of the k best among the experts that are left."
    value, at = scores.topk(k, -1)
    return value, keep[at]


def _softmax_router(m, logits, keep, norm, dtype):
    w, i = _chosen(logits[:, keep].float().softmax(-1), keep, m.top_k)
    return (w/w.sum(-1, keepdim=True) if norm else w).to(dtype), i


def _mixtral(m, x, keep, bias): return _softmax_router(m, F.linear(x, m.weight) + bias, keep, True, torch.float32)
def _qwen(m, x, keep, bias): return _softmax_router(m, F.linear(x, m.weight) + bias, keep, m.norm_topk_prob, x.dtype)


def _gpt_oss(m, x, keep, bias):
    w, i = _chosen((F.linear(x, m.weight, m.bias) + bias)[:, keep], keep, m.top_k)
    return w.softmax(1), i


def _granite(m, x, keep, bias):
    w, i = _chosen((F.linear(x, m.weight) + bias).float()[:, keep], keep, m.top_k)
    return w.softmax(-1).type_as(x), i


def _llama4(m, x, keep, bias):
    w, i = _chosen((F.linear(x, m.weight) + bias)[:, keep], keep, m.top_k)
    return w.float().sigmoid().to(x.dtype), i


def _deepseek(m, x, keep, bias):
    scores = (F.linear(x.float(), m.weight.float()) + bias).sigmoid()
    choice = torch.full_like(scores, -torch.inf)
    choice[:, keep] = (scores + m.e_score_correction_bias)[:, keep]
    groups = choice.view(len(x), m.num_group, -1)
    best = groups.topk(2, -1).values.sum(-1).topk(m.topk_group, -1).indices
    allowed = torch.zeros(len(x), m.num_group, dtype=torch.bool).scatter(1, best, True)
    i = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(1).topk(m.top_k, -1).indices
    w = scores.gather(1, i)
    return (w/w.sum(-1, keepdim=True) if m.norm_topk_prob else w)*m.routed_scaling_factor, i


def _gemma4(m, x, keep, bias):
    x = m.norm(x)*m.scale*m.scalar_root_size
    w, i = _chosen((F.linear(x, m.proj.weight) + bias)[:, keep].softmax(-1, dtype=torch.float32), keep, m.config.top_k_experts)
    return w/w.sum(-1, keepdim=True)*m.per_expert_scale[i], i


def _phi(m, x, keep, bias):
    s, eps = (F.linear(x, m.weight) + bias)[:, keep], m.router_jitter_noise
    def best(s, size): # the largest, and its share of those that are nearly as large
        top, i = s.max(-1, keepdim=True)
        near = s.masked_fill((top - s)/torch.maximum(size, top) > 2*eps, -torch.inf)
        return near.softmax(-1).gather(1, i), i
    w1, i1 = best(s, s.abs())
    w2, i2 = best(s.scatter(1, i1, -torch.inf), s.abs())
    return torch.cat([w1, w2], 1), keep[torch.cat([i1, i2], 1)]


_routers = dict(mixtral=_mixtral, qwen2_moe=_qwen, qwen3_moe=_qwen, olmoe=_qwen, gpt_oss=_gpt_oss, deepseek_v3=_deepseek,
                llama4=_llama4, gemma4_moe=_gemma4, granite_moe=_granite, phi_moe=_phi)


@dataclass
class Change:
    "One change by hand: of neurons at a site, or of the logits of experts."
    op: str # "times", "set", "plus"; at a router "off" and "plus"
    at: dict # layer -> (neurons or experts, values)
    site: str = "gate"
    where: object = lambda layer, position: torch.ones_like(position, dtype=torch.bool) # of one prompt without pads


_change = dict(times=lambda a, v: a*v, set=lambda a, v: v.expand_as(a), plus=lambda a, v: a + v)


@dataclass(eq=False)
class ByHand:
    "A plain model whose gates, experts and routers are done by hand."
    hf: object
    arch: str
    implementation: str = "eager" # of the experts
    parts: list | None = None # of every layer; None = those of `PARTS`
    changes: list = field(default_factory=list)
    seen: dict = field(default_factory=dict) # layer -> pre, up, a and post [row, neuron] of the last pass, nan where a neuron was not asked
    weights: dict = field(default_factory=dict) # layer -> [row, expert], nan where a token did not go

    def __post_init__(self):
        self.parts = self.parts or PARTS[self.arch]
        self.widths = [sum(p.size for p in parts) for parts in self.parts]
        for l, (layer, parts) in enumerate(zip(layers_of(self.hf, self.arch), self.parts, strict=True)):
            start = 0
            for p in parts:
                (self._mixture if isinstance(p, Mixture) else self._dense)(l, layer, p, start)
                start += p.size

    def changed(self, layer, site, x, neurons, token):
        "Activations [row, neuron] of these neurons of the layer [row, neuron], changed."
        for c in self.changes:
            if c.site != site or layer not in c.at: continue
            which, values = c.at[layer]
            full = torch.zeros(self.widths[layer], dtype=torch.float64).index_copy(0, which, values.double()).to(x.dtype)
            on = torch.zeros(len(full), dtype=torch.bool).index_fill(0, which, True)
            x = torch.where(on[neurons] & c.where(layer, token)[:, None], _change[c.op](x, full[neurons]), x)
        return x

    def product(self, l, n, neurons, token, pre, a, up):
        "What enters the down projection; the activations are kept first."
        got = dict(pre=pre, up=up, a=a, post=a*up)
        if l not in self.seen: self.seen[l] = {k: torch.full((n, self.widths[l]), torch.nan, dtype=torch.float64) for k in got}
        for k, x in got.items(): self.seen[l][k][token[:, None], neurons] = x.double()
        return self.changed(l, "post", self.changed(l, "gate", a, neurons, token)*up, neurons, token)

    def _dense(self, l, layer, p, start):
        at, got, (gate, up, down) = layer.get_submodule(p.path) if p.path else layer, {}, p.names
        for name in [gate, *([up] if up else [])]:
            at.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: got.update({name: out}))
        def before(m, args):
            g = got[gate].reshape(-1, got[gate].shape[-1])
            g, u = g.chunk(2, -1) if up is None else (g, got[up].reshape(g.shape) if up else torch.ones_like(g))
            post = self.product(l, len(g), (start + torch.arange(p.width)).expand(len(g), -1), torch.arange(len(g)), g, p.act(g), u)
            return (post.view(args[0].shape),)
        at.get_submodule(down).register_forward_pre_hook(before)

    def gate(self, l, p, start, n, gate_up, token, expert):
        "Rows of gate and up of experts to what enters their down projection."
        if self.arch == "gpt_oss":
            g, u = gate_up[..., ::2].clamp(max=7.), gate_up[..., 1::2].clamp(-7., 7.) + 1
            a = g*torch.sigmoid(g*1.702)
        else:
            g, u = gate_up.chunk(2, -1)
            a = p.act(g)
        return self.product(l, n, start + expert[:, None]*p.width + torch.arange(p.width), token, g, a, u)

    def _mixture(self, l, layer, p, start):
        experts, router = layer.get_submodule(p.path), layer.get_submodule(p.router)
        run = dict(eager=self._loop).get(self.implementation, self._theirs) if self.arch != "llama4" else self._llama4
        router.forward = lambda x: self._route(l, p, router, x.reshape(-1, x.shape[-1]))
        experts.forward = lambda *args: run(l, p, start, experts, *args)

    def _route(self, l, p, router, x):
        bias, keep = torch.zeros(len(x), p.count, dtype=x.dtype), torch.ones(len(x), p.count, dtype=torch.bool)
        for c in self.changes:
            if c.site != "router" or l not in c.at: continue
            (which, values), here = c.at[l], c.where(l, torch.arange(len(x)))[:, None]
            if c.op == "off": keep[:, which] &= ~here
            else: bias[:, which] += values.to(x.dtype)*here
        w, i = self._by_keep(router, x, keep, bias)
        self.weights[l] = torch.full((len(x), p.count), torch.nan, dtype=torch.float64).scatter(1, i, w.double())
        if self.arch != "llama4": return None, w, i
        return torch.zeros(len(x), p.count, dtype=x.dtype).scatter(1, i, w), None

    def _by_keep(self, router, x, keep, bias):
        "The choice of every token: those with the same experts left are routed together."
        if (keep == keep[:1]).all(): return _routers[self.arch](router, x, keep[0].nonzero()[:, 0], bias)
        rows = [_routers[self.arch](router, x[[n]], keep[n].nonzero()[:, 0], bias[[n]]) for n in range(len(x))]
        return tuple(torch.cat(o) for o in zip(*rows))

    def _loop(self, l, p, start, m, x, index, weights):
        "transformers' eager loop."
        out = torch.zeros_like(x)
        for e in range(p.count):
            slot, token = torch.where((index == e).T)
            if not len(token): continue
            rows = lambda gate_up: self.gate(l, p, start, len(x), gate_up, token, torch.full_like(token, e))
            if self.arch == "gpt_oss":
                y = rows(x[token] @ m.gate_up_proj[e] + m.gate_up_proj_bias[e]) @ m.down_proj[e] + m.down_proj_bias[e]
            else:
                y = F.linear(rows(F.linear(x[token], m.gate_up_proj[e])), m.down_proj[e])
            out.index_add_(0, token, (y * weights[token, slot, None]).to(out.dtype))
        return out

    def _theirs(self, l, p, start, m, x, index, weights):
        "Another of transformers' implementations, with the gate of this class."
        k, expert = index.shape[1], index.flatten()
        at = expert.sort().indices if self.implementation == "grouped_mm" else torch.arange(len(expert))
        m._apply_gate = lambda rows: self.gate(l, p, start, len(x), rows, at//k, expert[at])
        return getattr(moe, f"{self.implementation}_experts_forward")(m, x, index, weights)

    def _llama4(self, l, p, start, m, x):
        "Every expert is given every token, times a score that is 0 where it was not chosen."
        n, x = len(x)//p.count, x.view(p.count, -1, x.shape[-1])
        gate_up = torch.bmm(x, m.gate_up_proj)
        gate, up = gate_up.chunk(2, -1)
        post = up*p.act(gate)
        for e in range(p.count):
            token = (~self.weights[l][:, e].isnan()).nonzero()[:, 0]
            if not len(token): continue
            rows = self.gate(l, p, start, n, gate_up[e, token], token, torch.full_like(token, e))
            if any(l in c.at for c in self.changes): post[e, token] = rows
        return torch.bmm(post, m.down_proj).view(-1, x.shape[-1])

    @torch.no_grad()
    def run(self, ids, **kwargs):
        "Logits of a batch without pads."
        self.seen.clear(), self.weights.clear()
        if self.arch != "mt5": return self.hf(ids, use_cache=False, **kwargs).logits
        start = torch.full((len(ids), 1), self.hf.config.decoder_start_token_id)
        return self.hf(input_ids=ids, decoder_input_ids=torch.cat([start, ids], 1), use_cache=False, **kwargs).logits[:, 1:]

    @torch.no_grad()
    def greedy(self, ids, n):
        "The tokens that a plain loop without a cache adds to one prompt."
        two = self.arch == "mt5"
        known = torch.full((1, 1), self.hf.config.decoder_start_token_id) if two else ids[None]
        for _ in range(n):
            fed = dict(input_ids=ids[None], decoder_input_ids=known) if two else dict(input_ids=known)
            self.seen.clear()
            known = torch.cat([known, self.hf(**fed, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            if known[0, -1] == 2: break # the end of a text
        return known[0, 1 if two else len(ids):]


@dataclass
class Truth:
    "What the neurons of a model did on all tokens of a text: of every layer [token, neuron], nan where a neuron was not asked."
    pre: list
    up: list # 1 without a gate
    a: list
    post: list
    weight: list # [token, expert]; None = no experts

    def at(self, site): return self.a if site == "gate" else self.post
    def near(self, site, layer, eps):
        "Where rounding may decide the sign."
        gate = self.pre[layer].abs() < eps
        return gate if site == "gate" else gate | (self.up[layer].abs() < eps) | (self.a[layer].abs() < eps)


def truth_of(hand, batches, skip=1):
    "The truth over batches of token ids, of which the first `skip` positions are no text."
    rows = [[] for _ in hand.parts]
    for ids in batches:
        hand.run(ids)
        for l, seen in hand.seen.items():
            lead = int(hand.arch == "mt5" and l >= 2) # the decoder's start token
            text = (torch.arange(ids.shape[1] + lead) >= skip + lead).repeat(len(ids))
            rows[l].append([*(seen[k][text] for k in ("pre", "up", "a", "post")), hand.weights[l][text] if l in hand.weights else None])
    return Truth(*([None if r[0][i] is None else torch.cat([x[i] for x in r]) for r in rows] for i in range(5)))
