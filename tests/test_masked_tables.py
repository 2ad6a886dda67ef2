"""Tables for diffusers' masked schedulers: stock when off, exact counts, and the law of samples by enumeration."""

import math
from itertools import combinations, pairwise, permutations

import diffusers
import pytest
import torch
from exact_chains import ExactNetwork, MarkovChain, exact_scheduler, markov_chain, sequences, total_variation

from diffusers_ext.hub import export_pipeline
from diffusers_ext.jump_your_steps import TimestepTables, optimize_timesteps
from diffusers_ext.schedulers.timestep_tables import masked_counts

if not hasattr(diffusers, "BlockRefinementScheduler"):
    pytest.skip("this diffusers has no BlockRefinementScheduler", allow_module_level=True)

from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    BlockRefinementScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    EntropyBoundScheduler,
    LLaDA2Pipeline,
    UVit2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from diffusers_ext import TableAmusedScheduler, TableBlockRefinementScheduler

TABLE = [1.0, 0.9, 0.7, 0.3, 1e-5]
MASK, RANDOM = 7, (1e6, 1e6)  # 7 tokens; a temperature that leaves nothing of confidence


def logits_of(tokens: torch.Tensor) -> torch.Tensor:
    weight = torch.randn(MASK + 1, MASK, generator=torch.Generator().manual_seed(0))
    return weight[tokens] + weight[tokens.roll(1, dims=1)]


def sampled(scheduler, steps: int = 4, **options) -> tuple[torch.Tensor, list[list[int]]]:
    """Tokens (3, 20), and how many were masked after each step."""
    generator, tokens, counts = torch.Generator().manual_seed(1), torch.full((3, 20), MASK), []
    if isinstance(scheduler, AmusedScheduler):
        scheduler.set_timesteps(steps)
        times = scheduler.timesteps
    else:
        scheduler.set_timesteps(steps, block_length=20)
        times, options = range(steps), {"mask_token_id": MASK, "temperature": 1.0, **options}
    for t in times:
        tokens = scheduler.step(logits_of(tokens), t, tokens, generator=generator, **options).prev_sample
        counts.append((tokens == MASK).sum(dim=1).tolist())
    return tokens, counts


AMUSED = (AmusedScheduler, TableAmusedScheduler, {"mask_token_id": MASK})
BLOCK = (BlockRefinementScheduler, TableBlockRefinementScheduler, {"threshold": 1.0})
BOTH = pytest.mark.parametrize(("stock", "ours", "settings"), [AMUSED, BLOCK], ids=["amused", "block"])


@BOTH
@pytest.mark.parametrize("variant", [0, 1])
def test_off_is_stock(stock, ours, settings, variant):
    other = {"masking_schedule": "linear"} if stock is AmusedScheduler else {"threshold": 0.6}
    settings = settings if variant == 0 else {**settings, **other}
    expected = sampled(stock(**settings))
    for options in ({}, {"timestep_tables": {"4": TABLE}, "timestep_spacing": "uniform"}, {"timestep_tables": {}}):
        found = sampled(ours(**settings, **options))
        assert torch.equal(found[0], expected[0]) and found[1] == expected[1]


@BOTH
def test_a_table_decides_how_many_are_masked(stock, ours, settings):
    scheduler = ours(**settings, timestep_tables={"4": TABLE})
    assert sampled(scheduler)[1] == [[18] * 3, [14] * 3, [6] * 3, [0] * 3]
    assert sampled(stock(**settings))[1] != sampled(scheduler)[1]
    for steps in (1, 3, 20, 23):  # interpolated: something every step, as long as there is
        counts = [20, *(row[0] for row in sampled(scheduler, steps)[1])]
        assert all(a > b or a == 0 for a, b in pairwise(counts)) or steps > 20
        assert counts[-1] == 0


def test_a_table_of_stock_counts_is_stock():
    """By the same random numbers, for a square of tokens too, whatever the own schedule would do."""
    even = TableBlockRefinementScheduler(timestep_tables={"4": [1.0, 0.75, 0.5, 0.25, 1e-6]}, threshold=1.0)
    assert torch.equal(sampled(even)[0], sampled(BlockRefinementScheduler(threshold=1.0))[0])
    cosine = [1.0, *(math.floor(20 * math.cos(i * math.pi / 8)) / 20 for i in (1, 2, 3)), 1e-6]
    for own in ("cosine", "linear"):
        table = TableAmusedScheduler(MASK, own, timestep_tables={"4": cosine})
        stock = AmusedScheduler(MASK)
        assert torch.equal(sampled(table)[0], sampled(stock)[0])
        squares = []
        for scheduler in (table, stock):
            scheduler.set_timesteps(4)
            tokens, logits = torch.full((2, 4, 5), MASK), torch.randn(2, MASK, 4, 5).mul(0).add(0.1)
            step = scheduler.step(logits, 3, tokens, generator=torch.Generator().manual_seed(0))
            squares.append(step.prev_sample)
        assert torch.equal(*squares) and squares[0].shape == (2, 4, 5)


def test_amused_noise_and_starting_ratio_follow_the_table():
    scheduler = TableAmusedScheduler(MASK, timestep_tables={"4": TABLE})
    scheduler.set_timesteps(4)
    tokens, generator = torch.zeros(100, 400, dtype=torch.long), torch.Generator().manual_seed(0)
    for timestep, share in ((3, 0.9), (1, 0.3), (0, 0.0)):
        masked = (scheduler.add_noise(tokens, timestep, generator) == MASK).double().mean()
        assert float(masked) == pytest.approx(share, abs=0.01)
    sample = torch.full((2, 20), MASK)
    output = scheduler.step(logits_of(sample), 2, sample, starting_mask_ratio=0.5, generator=generator)
    assert (output.prev_sample == MASK).sum(dim=1).tolist() == [7, 7]


@pytest.mark.parametrize("length", [1, 5, 64, 1000])
@pytest.mark.parametrize("steps", [1, 2, 5, 64])
def test_counts(length, steps):
    edges = [1.0, *(1e-5 + (1 - 1e-5) * (1 - i / steps) ** 2 for i in range(1, steps + 1))]
    counts = [length, *masked_counts(edges, length)]
    assert len(counts) == steps + 1 and counts[-1] == 0
    assert all(a > b or a == b == 0 for a, b in pairwise(counts))
    if length == 1000 and steps == 5:
        assert counts == [1000, 640, 360, 160, 40, 0]
    assert masked_counts([1.0, 0.29, 1e-5], 100) == [29, 0]  # 0.29 * 100 is less than 29


# The law of samples, by enumeration


def law(chain: MarkovChain, network, counts: list[int], temperatures: list[float]) -> torch.Tensor:
    """Of sequences, (sequences,) float64. Masked after step i are counts[i], those kept won by confidence."""
    every, size = sequences(chain), [chain.num_tokens] * chain.length
    laws = {tuple(range(chain.length)): torch.ones(len(every), dtype=torch.float64)}  # by masked positions
    for count, temperature in zip(counts, temperatures, strict=True):
        after: dict[tuple, torch.Tensor] = {}
        for masked, mass in laws.items():
            tokens = every.index_fill(1, torch.tensor(masked), chain.num_tokens)
            clean = network(tokens, torch.full((len(every),), 0.5)).double()
            confidence = clean.gather(-1, every.unsqueeze(-1))[:, list(masked), 0]
            drawn = mass * confidence.prod(dim=1)
            for kept in combinations(range(len(masked)), len(masked) - count):
                rest = tuple(p for i, p in enumerate(masked) if i not in kept)
                part = (drawn * chosen(confidence, kept, temperature)).view(size)
                part = part.sum(dim=rest, keepdim=True).expand(size).flatten() if rest else part.flatten()
                after[rest] = after.get(rest, 0) + part
        laws = after
    return laws[()]


def error(*args) -> float:
    """Total variation of the samples from the chain."""
    return total_variation(law(*args), args[0].probabilities)


def chosen(confidence: torch.Tensor, kept: tuple[int, ...], temperature: float) -> torch.Tensor:
    """Probability that the columns `kept` are the highest of log confidence + temperature * Gumbel, (sequences,)."""
    if len(kept) == confidence.shape[1]:
        return torch.ones(len(confidence), dtype=torch.float64)
    if temperature == 0:
        best = confidence.topk(len(kept), dim=1).indices.sort(dim=1).values
        return (best == torch.tensor(kept)).all(dim=1).double()
    weights = confidence ** (1 / temperature)
    total = torch.zeros(len(confidence), dtype=torch.float64)
    for order in permutations(kept):
        left, one = weights.sum(dim=1), 1.0
        for column in order:
            one, left = one * weights[:, column] / left, left - weights[:, column]
        total += one
    return total


class Model(torch.nn.Module):
    """An exact network as a network of diffusers: logits, a mask somewhere, and no time."""

    def __init__(self, network: ExactNetwork, mask: int, columns: int):
        super().__init__()
        self.network, self.mask, self.columns = network, mask, columns

    def forward(self, tokens, time=None):
        tokens = tokens.masked_fill(tokens == self.mask, self.network.scheduler.mask_token_id)
        laws = self.network(tokens, torch.full((len(tokens),), 0.5))[..., :-1]
        return torch.nn.functional.pad(laws, (0, self.columns - laws.shape[-1])).clamp(min=1e-30).log()


@pytest.fixture(scope="module")
def exact():
    chain = markov_chain(3, 5, 1, sharpness=2.5)
    return chain, ExactNetwork(chain, exact_scheduler("absorbing", 3))


# Amused's mask lies beyond the columns of its network, LLaDA2's among them
@pytest.mark.parametrize(
    ("scheduler", "mask", "columns", "options"),
    [(AmusedScheduler(6), 6, 3, {}), (BlockRefinementScheduler(threshold=1.0), 4, 5, {"mask_token_id": 4})],
    ids=["amused", "block"],
)
def test_an_optimised_table_errs_less_in_random_order(exact, scheduler, mask, columns, options, tmp_path):
    chain, network = exact
    model = Model(network, mask, columns)
    tables = optimize_timesteps(model, scheduler, chain.draw(400), (2, 3), progress=False, **options)
    filled = tables.apply_to(scheduler)
    filled.save_pretrained(tmp_path)
    loaded = type(filled).from_pretrained(tmp_path)
    assert tables.chain == loaded.config.timestep_table_info["2"]["chain"]
    assert tables.chain["kernel"] == "absorbing" and tables.chain["vocab_size"] == columns + 1
    for steps in (2, 3):
        loaded.set_timesteps(steps)
        assert loaded.table == list(tables[steps])
        found, even = masked_counts(loaded.table, 5), masked_counts(torch.linspace(1, 0, steps + 1).tolist(), 5)
        assert [5 - n for n in found] == tables.info[steps]["token_counts"][1:]
        before, after = (error(chain, network, counts, [1e9] * steps) for counts in (even, found))
        assert after < 0.7 * before, (steps, before, after)


def test_order_by_confidence_errs_by_itself(exact):
    """One token a step is exact in random order, and is not by confidence: no table makes that right."""
    chain, network = exact
    errors = [
        error(chain, network, [4, 3, 2, 1, 0], temperatures)
        for temperatures in ([1e9] * 5, [2.0, 1.5, 1.0, 0.5, 0.0], [0.0] * 5)
    ]
    assert errors[0] < 1e-5 and 0.05 < errors[1] < errors[2]


@pytest.mark.parametrize("kind", ["amused, random", "amused, by default", "block"])
def test_samples_follow_the_enumerated_law(exact, kind):
    chain, network = exact
    model, edges = Model(network, 3, 3), [1.0, 0.8, 0.4, 1e-5]
    tokens, generator = torch.full((20_000, 5), 3), torch.Generator().manual_seed(0)
    if kind == "block":
        scheduler = TableBlockRefinementScheduler(5, threshold=1.0, timestep_tables={"3": edges})
        scheduler.set_timesteps(3)
        times, temperatures, options = range(3), [0.0] * 3, {"mask_token_id": 3, "temperature": 1.0}
        tokens = tokens[:4000]
    else:
        scheduler = TableAmusedScheduler(3, timestep_tables={"3": edges})
        scheduler.set_timesteps(3, RANDOM if kind == "amused, random" else (2, 0))
        times, temperatures, options = scheduler.timesteps, scheduler.temperatures.tolist(), {}
    for t in times:
        tokens = scheduler.step(model(tokens), t, tokens, generator=generator, **options).prev_sample
    expected = law(chain, network, [4, 2, 0], temperatures)
    places = tokens @ torch.tensor([81, 27, 9, 3, 1])
    shares = torch.bincount(places, minlength=243).double() / len(tokens)
    spread = (expected * (1 - expected) / len(tokens)).sqrt()
    assert ((shares - expected).abs() <= 6 * spread + 2 / len(tokens)).all()
    assert total_variation(shares, expected) < 1.5 * float(spread.sum()) / 2


# diffusers' pipelines


def amused(scheduler) -> AmusedPipeline:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformer = UVit2DModel(
        **sizes, use_bias=False, cond_embed_dim=8, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
        encoder_hidden_size=8, vocab_size=33, codebook_size=32, in_channels=8, block_out_channels=8, num_res_blocks=1,
        block_num_heads=1,
    )  # fmt: skip
    vqvae = VQModel(
        block_out_channels=[8], latent_channels=8, norm_num_groups=8, num_vq_embeddings=32, sample_size=8,
        mid_block_add_attention=False, lookup_from_codebook=True,
    )  # fmt: skip
    text = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, vocab_size=100, projection_dim=8))
    pipe = AmusedPipeline(vqvae, None, text, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_amused_saves_loads_and_exports(tmp_path):
    torch.manual_seed(0)
    pipe = amused(TableAmusedScheduler(32, timestep_tables={"4": TABLE}))
    pipe.save_pretrained(tmp_path / "saved")
    export_pipeline(pipe, tmp_path / "exported")
    embeds = {"prompt_embeds": torch.ones(1, 8), "encoder_hidden_states": torch.ones(1, 5, 8)}
    found = []
    for one in (
        pipe,
        DiffusionPipeline.from_pretrained(tmp_path / "saved", tokenizer=None),
        DiffusionPipeline.from_pretrained(tmp_path / "exported", tokenizer=None, trust_remote_code=True),
    ):
        one.set_progress_bar_config(disable=True)
        counts, options = [], {"guidance_scale": 0.0, "height": 10, "width": 2, "output_type": "latent"}
        tokens = one(
            **embeds, **options, num_inference_steps=4, generator=torch.Generator().manual_seed(0),
            callback=lambda i, t, x, counts=counts: counts.append(int((x == 32).sum())),
        )  # fmt: skip
        assert counts == [18, 14, 6, 0]
        found.append(tokens.images)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_llada2_commits_as_the_table_says():
    counts = []

    class Network(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, tokens, **_):
            counts.append(int((tokens[:, -20:] == MASK).sum()))
            return type("Output", (), {"logits": torch.nn.functional.pad(logits_of(tokens), (0, 1), value=-1e9)})

    pipe = LLaDA2Pipeline(Network(), TableBlockRefinementScheduler(20, timestep_tables={"4": TABLE}))
    pipe.set_progress_bar_config(disable=True)
    prompt = torch.zeros(1, 20, dtype=torch.long)
    result = pipe(
        input_ids=prompt, gen_length=40, block_length=20, num_inference_steps=4, threshold=1.0, temperature=1.0,
        editing_threshold=None, mask_token_id=MASK, eos_token_id=None, output_type="seq",
    )  # fmt: skip
    assert counts == [20, 18, 14, 6] * 2 and not (result.sequences == MASK).any()


# Refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TableAmusedScheduler(MASK, "sine"), 'masking_schedule must be "cosine" or "linear"'),
        (lambda: TableAmusedScheduler(MASK).set_timesteps(0), "num_inference_steps must be an integer >= 1"),
        (lambda: TableAmusedScheduler(MASK).set_timesteps(2, (1, 2, 3)), "temperature must be"),
        (lambda: TableAmusedScheduler(MASK).table, "call set_timesteps first"),
        (lambda: TableAmusedScheduler(MASK, timestep_spacing="even"), "timestep_spacing must be"),
        (lambda: TableBlockRefinementScheduler(timestep_tables={"2": [1.0, 0.5, 0.5]}), "strictly decreasing"),
        (lambda: TableBlockRefinementScheduler(0), "block_length and num_inference_steps must be >= 1"),
        (lambda: sampled(TableBlockRefinementScheduler(timestep_tables={"4": TABLE}), mask_token_id=None), "=None"),
        (lambda: TimestepTables({4: TABLE}, {"kernel": "uniform"}).apply_to(AmusedScheduler(3)), "not 'absorbing'"),
        (lambda: TimestepTables({4: TABLE}, {}).apply_to(EntropyBoundScheduler()), "whose steps a table decides"),
        (lambda: search(DDIMScheduler()), "whose steps a table decides"),
        (lambda: search(BlockRefinementScheduler()), "mask_token_id must be the network's mask token"),
        (lambda: search(AmusedScheduler(3), mask_token_id=3), "has none, or its own"),
        (lambda: search(BlockRefinementScheduler(), mask_token_id=1), "data must hold clean tokens"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def search(scheduler, **options):
    data = torch.ones(4, 5).long()
    return optimize_timesteps(lambda x, t: torch.ones(*x.shape, 3), scheduler, data, (2,), **options)


def test_the_network_is_asked_in_evaluation_mode(exact):
    model, modes = Model(exact[1], 3, 3).train(), []
    model.register_forward_pre_hook(lambda *_: modes.append(model.training))
    optimize_timesteps(model, AmusedScheduler(3), exact[0].draw(4), (2,), progress=False)
    assert modes and not any(modes) and model.training


@BOTH
def test_a_table_of_another_vocabulary(stock, ours, settings):
    scheduler = TimestepTables({4: TABLE}, {"kernel": "absorbing", "vocab_size": 4}).apply_to(stock(**settings))
    assert type(scheduler) is ours
    with pytest.raises(ValueError, match="made for a network of 3 tokens, model_output has 7"):
        sampled(scheduler)
