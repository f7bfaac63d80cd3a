"""The moments of a model do not depend on how its texts are put into batches."""

import pytest
import torch
from torch import nn

from bulkedge.moments import Moments
from helpers import some

transformers = pytest.importorskip("transformers")

LENGTHS = (3, 9, 5, 7, 2, 8)
TOKENS = sum(LENGTHS)
COMMON = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 32, "max_position_embeddings": 40}  # fmt: skip
# how each calls its table of positions, or of distances
MODELS = {
    "Bert": COMMON,  # (1, length)
    "DistilBert": {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32,
                   "max_position_embeddings": 40},  # (1, length)
    "GPT2": {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 40,
             "bos_token_id": 1, "eos_token_id": 1},  # (1, length)
    "Roberta": COMMON,  # (batch, length)
    "MPNet": COMMON,  # (length, length): a distance for each pair
    "OPT": {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 32,
            "num_attention_heads": 2, "max_position_embeddings": 40,
            "word_embed_proj_dim": 16},  # with a mask, from which it computes them
    "Bart": {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "max_position_embeddings": 40},  # with a part of the inputs
}  # fmt: skip
TABLES = {"Bert": "embeddings.position_embeddings", "DistilBert": "embeddings.position_embeddings",
          "GPT2": "wpe", "Roberta": "embeddings.position_embeddings",
          "MPNet": "encoder.relative_attention_bias", "OPT": "decoder.embed_positions",
          "Bart": "encoder.embed_positions"}  # fmt: skip
OFFSET = {"Roberta": 2, "OPT": 2, "Bart": 2}
"""Which index the first position has."""


def made(name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return getattr(transformers, f"{name}Model")(config).eval()


def batches(size, longest=0):
    drawn = torch.Generator().manual_seed(1)
    texts = [torch.randint(5, 50, (n,), generator=drawn) for n in LENGTHS]
    for at in range(0, len(texts), size):
        part = texts[at : at + size]
        ids = nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=1)
        ids = nn.functional.pad(ids, (0, max(0, longest - ids.shape[1])), value=1)
        mask = [[1] * len(row) + [0] * (ids.shape[1] - len(row)) for row in part]
        yield {"input_ids": ids, "attention_mask": torch.tensor(mask)}


def measured(model, inputs, **options):
    with Moments(model, **options) as moments, torch.no_grad():
        for batch in inputs:
            model(**batch)
    return dict(moments.layers)


@pytest.mark.parametrize("name", MODELS)
def test_padding_and_size_of_batches_change_nothing(name):
    model = made(name)
    sizes = (1, 0), (2, 0), (6, 0), (1, 12)  # the last to a fixed length
    alone, *others = (measured(model, batches(*size)) for size in sizes)
    for found in some(others):
        for layer in some(alone):
            if name == "Bart" and layer.startswith("decoder"):
                continue  # its text has a mask of its own, which is not given here
            assert found[layer].count == alone[layer].count, layer
            close = {"rtol": 1e-5, "atol": 1e-6}  # the model runs in float32
            torch.testing.assert_close(found[layer].moment, alone[layer].moment, **close)
            assert found[layer].output == pytest.approx(alone[layer].output, rel=1e-5)
    table = alone[TABLES[name]]
    if name == "MPNet":
        assert table.count == sum(n * n for n in LENGTHS)
        return
    first = OFFSET.get(name, 0)
    expected = torch.tensor([sum(n > i for n in LENGTHS) for i in range(max(LENGTHS))])
    assert table.count == TOKENS
    torch.testing.assert_close(
        table.moment[first : first + max(LENGTHS)].double() * TOKENS, expected.double()
    )


def test_without_a_mask_each_text_of_a_batch_counts_each_position():
    model = made("GPT2")
    ids = [torch.full((4, 6), 7), torch.full((2, 3), 8)]
    found = measured(model, [{"input_ids": x} for x in ids])
    assert found["wpe"].count == found["wte"].count == 4 * 6 + 2 * 3
    torch.testing.assert_close(
        found["wpe"].moment[:6].double() * 30, torch.tensor([6.0, 6, 6, 4, 4, 4]).double()
    )


class Positions(nn.Module):
    """A table, and a linear layer that all positions go through before they meet a text."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.words, self.table, self.wide = (
            nn.Embedding(50, 6),
            nn.Embedding(12, 6),
            nn.Linear(6, 6),
        )

    def forward(self, input_ids, attention_mask=None):
        places = torch.arange(input_ids.shape[1])
        if self.form == "row":
            return self.words(input_ids) + self.wide(self.table(places))
        if self.form == "batch of one":
            return self.words(input_ids) + self.wide(self.table(places[None]))
        x = self.words(input_ids.T) + self.wide(self.table(places[:, None]))  # the length first
        return x.transpose(0, 1)


@pytest.mark.parametrize("exact_width", [100, 4])
@pytest.mark.parametrize("form", ["row", "batch of one", "length first"])
def test_positions_that_texts_share_count_once_for_each(form, exact_width):
    torch.manual_seed(0)
    model = Positions(form)
    alone = measured(model, batches(1))
    found = measured(model, batches(6), exact_width=exact_width)
    for layer in ("words", "table"):
        assert found[layer].count == TOKENS
        torch.testing.assert_close(found[layer].moment, alone[layer].moment)
    if form == "row":
        return  # a matrix of rows may be of anything: they are counted as they come
    assert found["wide"].count == TOKENS
    assert found["wide"].output == pytest.approx(alone["wide"].output, rel=1e-5)


def test_what_fails_in_a_forward_of_its_own_is_not_counted():
    class Table(nn.Embedding):
        def forward(self, x):
            found = super().forward(x.long())
            if len(x) > 5:
                raise RuntimeError("six rows are too many")
            return found

    model = nn.Sequential(Table(9, 4), nn.Linear(4, 2))
    with Moments(model) as moments, torch.no_grad():
        model(torch.tensor([1.0, 1.0, 3.0]))
        with pytest.raises(RuntimeError, match="six rows are too many"):
            model(torch.zeros(6))
        model(torch.tensor([4.0]))
    layer = moments["0"]
    assert layer.count == 4
    assert (layer.moment * 4).tolist() == [0, 2, 0, 1, 1, 0, 0, 0, 0]
