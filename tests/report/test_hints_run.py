"""Each command that a hint prints runs, for every kind of fine-tune."""

import os
import shlex
import warnings

import pytest
import torch
from click.testing import CliRunner

import bulkedge
from bulkedge.cli import cli
from bulkedge.report.advice import steps
from cases import orthonormal

transformers = pytest.importorskip("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")
RECIPE = {"top_k": 4, "side": "both"}  # some kinds change the inputs alone
TARGETS = ["q_proj", "down_proj"]


def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return pretrained(transformers.LlamaForCausalLM(config))


def pretrained(model):
    """Not noise alone."""
    stacked = (p.data.reshape(-1, *p.shape[-2:]) for p in model.parameters() if p.ndim > 1)
    for number, weight in enumerate(weight for weights in stacked for weight in weights):
        u, v = (orthonormal(size, 6, 2 * number + side) for side, size in enumerate(weight.shape))
        weight += (u * torch.linspace(2, 1, 6).double() @ v.mT).float()
    return model


def lora(**options):
    settings = {"r": 2, "lora_alpha": 8, "target_modules": TARGETS}
    return peft.LoraConfig(**(settings | options))


KINDS = {
    "LoRA": (lora(), None),
    "rsLoRA": (lora(use_rslora=True), None),
    "LoRA with a bias": (lora(lora_bias=True), None),
    "LoRA beside weights in full": (lora(modules_to_save=["v_proj"]), None),
    "DoRA": (lora(use_dora=True), "DoRA"),
    "PiSSA": (lora(init_lora_weights="pissa"), "PiSSA"),
    "OLoRA": (lora(init_lora_weights="olora"), "OLoRA"),
    "PiSSA for a task": (lora(init_lora_weights="pissa", task_type="CAUSAL_LM"), "PiSSA"),
    "LoHa": (peft.LoHaConfig(r=2, alpha=8, target_modules=TARGETS), "loha"),
    "LoKr": (peft.LoKrConfig(r=2, alpha=8, target_modules=TARGETS), "lokr"),
    "IA3": (
        peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        "ia3",
    ),
    "OFT": (peft.OFTConfig(oft_block_size=4, target_modules=TARGETS), "oft"),
    "BOFT": (peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS), "boft"),
    "in full": (None, None),
}
"""What is put on the base, and what it has to be merged for."""


def disturb(model):
    """Change whatever is trained, strongly."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 3 * (parameter.std() if parameter.numel() > 1 else 0) * noise + noise


def tune(kind, folder):
    """A base, and a fine-tune of it with new directions."""
    base().save_pretrained(folder / "base")
    tokens = transformers.PreTrainedTokenizerFast(tokenizer_object=words(), pad_token="p")  # noqa: S106
    tokens.save_pretrained(folder / "base")
    (folder / "keep.txt").write_text("\n".join(f"w{i} w{i + 1} w{i + 2}" for i in range(30)))
    config, _ = KINDS[kind]
    model = base() if config is None else peft.get_peft_model(base(), config)
    disturb(model)
    model.save_pretrained(folder / "tuned")


def words():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    known = {"p": 0} | {f"w{i}": i + 1 for i in range(36)}
    tokenizer = Tokenizer(WordLevel(known, unk_token="p"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def run(line):
    done = CliRunner().invoke(cli, shlex.split(line)[1:])
    assert done.exception is None or isinstance(done.exception, SystemExit), (line, done.exception)
    assert done.exit_code in (0, 1), (line, done.output)
    return done


def follow(told):
    """Do what commands say, in their order; what was done, by their first words."""
    done = []
    for line in told:
        if line.startswith("python -c "):
            exec(shlex.split(line)[2], {})  # noqa: S102
            done.append("merge")
        elif line.startswith("bulkedge"):
            run(line)
            done.append(shlex.split(line)[1])
    return done


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_of_an_audit_run_in_their_order(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tune(kind, tmp_path)
    record = bulkedge.audit("base", "tuned", recipe=RECIPE)
    assert record.summary.new_directions
    told = [step.command for step in steps(record) if step.command]
    _, method = KINDS[kind]
    done = follow([line for line in told if line != "SpikeClip(model).attach(optimizer)"])
    assert done == [*(["merge"] if method else []), "moments", "repair", "report"]
    name = "merged" if method else "tuned"
    protect = (
        f"bulkedge repair base {name} --method protect --moments base.moments "
        "--exclude *embed_tokens* --exclude *lm_head* -o protected"
    )
    assert "REFUSED" not in run(protect).output
    if kind == "DoRA":
        unmerged = protect.replace(" merged ", " tuned ").replace("protected", "unmerged")
        assert CliRunner().invoke(cli, shlex.split(unmerged)[1:]).exit_code == 2


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "PiSSA", "OFT", "in full"])
def test_moments_name_the_commands_that_take_them(kind, tmp_path, monkeypatch):
    """Word for word and twice, though all that the first time wrote is in the way."""
    monkeypatch.chdir(tmp_path)
    tune(kind, tmp_path)
    (tmp_path / "task.txt").write_text((tmp_path / "keep.txt").read_text())
    _, method = KINDS[kind]
    more = " --exclude *embed_tokens* --exclude *lm_head*"  # on fewer inputs than their width
    (first, *_) = printed(run("bulkedge moments base task.txt --tuned tuned -o x.moments").stderr)
    run(first)
    for number in ("", "-2"):
        told = printed(run(f"bulkedge moments base keep.txt -o keep{number}.moments").stderr)
        told = printed(run(told[0].replace("TUNED", "tuned")).stderr)
        assert [line.split()[1] for line in told] == [*(["-c"] if method else []), "repair"]
        assert follow(told[:-1]) == (["merge"] if method else [])
        assert "REFUSED" not in run(told[-1] + more).output
        assert (tmp_path / f"protected{number}").is_dir()


@pytest.mark.parametrize("kind", ["LoRA", "OFT"])
def test_what_a_hint_has_written_is_not_in_the_way_of_the_next(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tune(kind, tmp_path)
    record = bulkedge.audit("base", "tuned", recipe=RECIPE)
    merge = ["merge"] if KINDS[kind][1] else []
    for number in ("", "-2", "-3"):
        told = [step.command for step in steps(record, os.path.lexists) if step.command]
        shown = printed(run("bulkedge audit base tuned -k 4 --side both").stdout)
        shown = [line for line in shown if not line.endswith("--critical-scale")]
        assert shown == told[: len(shown)]  # a terminal has the first of them
        done = follow([line for line in told if line != "SpikeClip(model).attach(optimizer)"])
        if number == "":  # once there are moments of the base, they are used
            assert done == [*merge, "moments", "repair", "report"]
        else:
            assert done == [*merge, "repair", "repair", "report"]
        assert (tmp_path / f"repaired{number}.html").is_file()
    assert (tmp_path / "protected-2").is_dir()
    assert not (tmp_path / "base-2.moments").exists()


def test_nothing_is_measured_for_experts_that_protect_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    model = pretrained(transformers.Qwen3MoeForCausalLM(config))
    model.save_pretrained("base")
    adapted = lora(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(model, adapted)
    disturb(model)
    model.save_pretrained("tuned")
    record = bulkedge.audit("base", "tuned", recipe=RECIPE)
    told = [step.command for step in steps(record) if step.command]
    assert follow(told) == ["repair", "report"]


def test_a_merged_model_that_equals_the_base_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tune("in full", tmp_path)
    measured = CliRunner().invoke(
        cli, shlex.split("moments base keep.txt --tuned base -o x.moments")
    )
    assert "there is no fine-tune here" in str(measured.exception)
    assert not (tmp_path / "x.moments").exists()
    run("bulkedge moments base keep.txt -o base.moments")
    for options in ("", "--method protect --moments base.moments"):
        done = CliRunner().invoke(cli, shlex.split(f"repair base base {options} -o repaired"))
        assert done.exit_code == 2
        assert "all 9 matrices equal the base: there is no fine-tune here" in done.stdout
        assert "no matrix that could be judged differs from the base" in done.stderr


@pytest.mark.parametrize("kind", ["PiSSA", "DoRA"])
def test_a_repair_that_refuses_says_how_to_merge(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tune(kind, tmp_path)
    run("bulkedge moments base keep.txt -o base.moments")
    line = "repair base tuned --method protect --moments base.moments -o protected"
    done = CliRunner().invoke(cli, shlex.split(line))
    assert done.exit_code == 2
    assert follow(printed(done.stderr)) == ["merge"]
    assert "REFUSED" not in run("bulkedge " + line.replace("tuned", "merged")).output


@pytest.mark.parametrize("kind", ["LoRA", "LoRA beside weights in full", "PiSSA", "DoRA", "LoHa"])
def test_the_commands_of_a_budget_run_in_their_order(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tune(kind, tmp_path)
    for name in ("weaker", "merged"):
        (tmp_path / name).touch()
    done = CliRunner().invoke(cli, shlex.split("budget base --like tuned --level 0.01"))
    told = printed(done.stderr)
    follow(told[:-1])
    assert "REFUSED" not in run(told[-1]).output


@pytest.mark.parametrize("format", ["markdown", "html"])
def test_a_file_says_the_same_whatever_lies_beside_it(format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tune("OFT", tmp_path)
    record = bulkedge.audit("base", "tuned", recipe=RECIPE)
    before = bulkedge.report.render(record, format)
    assert "-o repaired" in before
    for name in ("merged", "repaired", "base.moments", "repaired.html"):
        (tmp_path / name).touch()
    assert bulkedge.report.render(record, format) == before


def test_the_line_that_merges_loads_the_class_that_was_trained(tmp_path, monkeypatch):
    """The names of a head model's modules are others; of another class nothing would be merged."""
    monkeypatch.chdir(tmp_path)
    config = base().config
    base().save_pretrained("base")
    config.num_labels = 5
    model = transformers.AutoModelForSequenceClassification.from_pretrained("base", config=config)
    model = peft.get_peft_model(model, lora(use_dora=True, task_type="SEQ_CLS"))
    disturb(model)
    model.save_pretrained("tuned")
    record = bulkedge.audit("base", "tuned", recipe=RECIPE)
    told = [step.command for step in steps(record) if step.command]
    assert follow(told[:1]) == ["merge"]
    merged = bulkedge.audit("base", "merged", recipe=RECIPE)
    assert merged.summary.new_directions == record.summary.new_directions > 0


def printed(text):
    """The commands that a command advises."""
    return [line.strip() for line in text.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_weaker_copy_is_written_by_the_commands_that_are_printed(kind, tmp_path, monkeypatch):
    """Where α does not scale all of an update, nothing speaks of serving it."""
    monkeypatch.chdir(tmp_path)
    tune(kind, tmp_path)
    told = printed(run("bulkedge audit base tuned -k 4 --side both").output)
    measure = next(line for line in told if line.endswith("--critical-scale"))
    lines = run(measure).output.splitlines()
    first = next(line for line in lines if line.startswith("weaker:"))
    _, method = KINDS[kind]
    by_alpha = {"LoRA beside weights in full": "weights stored in full", "LoHa": None, "LoKr": None}
    part = by_alpha.get(kind, method)
    left = [line for line in lines if "α does not scale all of it" in line]
    assert [f"({part}" in line for line in left] == ([] if part is None else [True])
    assert ("serve" in first) is (part is None and kind != "in full")
    copy = next(i for i, line in enumerate(lines) if "this writes the weaker copy" in line) + 1
    assert f"--uniform {first.partition('≤ ')[2].split()[0]} " in lines[copy]
    merge = method is not None or part is not None
    told = [line.strip() for line in lines[copy - 2 : copy + 1] if line.startswith("  ")]
    assert follow(told) == [*(["merge"] if merge else []), "repair"]
    assert bulkedge.audit("base", "weaker", recipe=RECIPE).summary.new_directions == 0


def test_what_is_left_of_new_directions_is_taken_out_by_the_command_that_is_printed(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tune("DoRA", tmp_path)
    line = "bulkedge repair base tuned --method scale --keep 0.9 -k 4 -o repaired"
    done = run(line)
    assert done.exit_code == 1
    (again, page) = printed(done.stderr)
    assert again.endswith("--rounds 30 -o repaired-again")
    assert page.startswith("bulkedge report repaired")
    assert run(again).exit_code == 0
