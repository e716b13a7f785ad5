"""The legacy scripts' command lines: every flag, both ways, in every form in which they are pasted."""

import random
import shlex

import pytest

from moe_core import ConfigError, Run, RunConfig, preset
from moe_core.commands import parse, read, spell
from moe_core.dialects.flags import DENSE, DIALECTS, EXPERIMENTAL, FIELDS, LAUNCH
from moe_core.model import count_params
from widgets import Workbench

# Every flag of the three scripts, with its default where one is known.
OLD = {"train_experimental.py": """
    vocab_size 32768 n_layer 10 n_head 8 n_kv_heads none d_model 512 n_experts 4 block_size 2048 dropout 0 bias -
    capacity_factor 1.25 dropless + load_balance_alpha 0.05 router_z_loss_coef 0 attn_gate none use_rope +
    rope_theta 10000 qk_norm - qk_norm_eps 1e-6 moe_grouped ? router_temp_init 1.5 router_temp_final 1.0
    router_temp_anneal_iters 1000 router_noise_std_init 0.5 router_noise_decay_iters 1000 router_noise_type gumbel
    device cuda batch_size 8 gradient_accumulation_steps 1 max_iters 2000 eval_interval 200 eval_iters 50
    learning_rate 3e-4 min_lr 3e-5 weight_decay 0.1 beta1 0.9 beta2 0.95 warmup_iters 500 lr_decay_iters 2000
    grad_clip 1.0 compile ? seed 1337 optimizer adamw muon_lr 3e-2 muon_wd 1e-2 sophia_lr 1e-3 sophia_b1 0.965
    sophia_b2 0.99 sophia_rho 0.1 sophia_wd 0.2 sophia_k 10 dataset_name HuggingFaceFW/fineweb-edu
    dataset_config sample-10BT text_key text shuffle_buffer 8192 eval_take 512 checkpoint_dir checkpoints_moe_bf16
    log_interval 10 save_interval 0 keep_checkpoints 3 resume none auto_resume -
    wandb_project moe-bf16-experiments_v2 wandb_run_name none""",
       "train_dense_gpu.py": """
    dataset c4 dataset-config en split train val-split validation tokenizer gpt2 layers 12 heads 11 d-model 704
    block-size 1024 batch 8 grad-accum 2 steps 500 ckpt - compile ? amp ? opt-list ? num-workers 4 prefetch-factor 8
    shuffle-buffer 4000 val-every 200 val-iters 50 csv none qk-norm - clip-grad 1.0 k-hess 10 k-hess-after none
    k-hess-switch-step none""",
       "launch_training.py": """
    vocab-size 50257 dim 512 n-layers 8 n-heads 8 n-kv-heads 2 num-experts 8 top-k 2 skip-first-n-moe 0 batch-size 4
    gradient-accumulation-steps 16 max-steps 10000 learning-rate 3e-4 weight-decay 0.1 warmup-steps 2000
    grad-clip 1.0 train-data ? val-data none seq-len 512 resume none use-wandb - wandb-project ? wandb-run-name none"""}
EXPERIMENT_1 = (
    "python train_experimental.py --device cuda --dataset_name HuggingFaceFW/fineweb-edu --dataset_config sample-10BT "
    "--n_experts 8 --dropless --load_balance_alpha 0.12 --router_z_loss_coef 1e-3 --router_temp_init 2.2 "
    "--router_temp_final 1.3 --router_temp_anneal_iters 5000 --router_noise_std_init 0.9 "
    "--router_noise_decay_iters 5000 --router_noise_type gumbel --attn_gate sigmoid_head --qk_norm --use_rope "
    "--batch_size 8 --gradient_accumulation_steps 8 --learning_rate 8e-4 --max_iters 8000 --lr_decay_iters 8000 "
    "--warmup_iters 1000 --eval_interval 200 --eval_iters 50 --wandb_project moe-bf16-experiments_v2 --seed 1337")
SHOOTOUT = (
    "--dataset c4 --dataset-config en --split train --val-split validation --tokenizer gpt2 --layers 12 --heads 11 "
    "--d-model 704 --block-size 1024 --batch 8 --grad-accum 2 --steps 500 --ckpt --compile --amp bf16 "
    "--opt-list adamw,muon_adamw,muon_sophia,sophia --num-workers 4 --prefetch-factor 8 --shuffle-buffer 4000 "
    "--val-every 200 --val-iters 50 --csv runs/name.csv --qk-norm --clip-grad 1.0 --k-hess 10 --k-hess-after 20 "
    "--k-hess-switch-step 3500")


def value_of(config, field):
    return next(vars(part)[field] for part in (config, config.model, config.router, config.data, config.optim)
                if field in vars(part))


def old_flags(script):
    words = OLD[script].split()
    return dict(zip(words[::2], words[1::2], strict=True))


def other_value(config, field):
    """A value for a field that is valid beside this config's others, and is not its present one."""
    now, hint = value_of(config, field), FIELDS[field]
    choices = next((f.metadata.get("choices") for part in (config, config.model, config.router, config.data,
                                                           config.optim)
                    for f in part.__dataclass_fields__.values() if f.name == field), None)
    if choices:
        return next(choice for choice in reversed(choices) if choice != now)
    if field in ("opt_list", "mirrors"):
        return {"opt_list": "sophia,adamw", "mirrors": "trackio,wandb"}[field]
    if field == "n_kv_heads":
        return 1
    if hint is float:
        return 0.25 if now == 0 else now / 2
    if hint in (int, int | None):
        return 2 * (now or 2)
    if hint == float | None:
        return random.uniform(1e-5, 1e-3)
    return not now if hint is bool else random.choice(["a b", "it's", "C:\\x\\y", 'say "x"', "a=b", "ünï", "$HOME #1"])


@pytest.mark.parametrize("script", DIALECTS)
def test_every_flag_of_the_old_scripts_is_known_and_has_its_default(script):
    """A bare script has each listed default; the table lists no flag more and none less."""
    config, flags = parse(f"python {script}"), old_flags(script)
    assert {name.replace("-", "_") for name in flags} == set(DIALECTS[script].flags)
    for name, said in flags.items():
        flag = DIALECTS[script].flags[name.replace("-", "_")]
        now = value_of(config, flag.field)
        if said in "+-":
            assert now == (flag.words[said == "+"] if flag.words else said == "+"), name
        elif said != "?":
            assert now == value_of(parse(f"python {script} --{name} {said}"), flag.field), name
            assert (now is None) == (said == "none" and flag.field != "attn_gate"), name


@pytest.mark.parametrize("script", DIALECTS)
def test_every_flag_sets_its_field_both_ways(script):
    """--flag value, --flag=value, dashes or underscores, --flag and --no-flag: the field says so, and back again."""
    for flag in DIALECTS[script].flags.values():
        base, partner = DIALECTS[script].base, ""
        if flag.field in ("sophia_k_after", "sophia_k_switch_step"):
            partner = "--k_hess_after 7" if flag.field == "sophia_k_switch_step" else "--k_hess_switch_step 7"
        for name in (flag.name, flag.name.replace("_", "-")):
            if flag.is_switch:
                for on, typed in ((True, f"--{name}"), (False, f"--no-{name}"), (False, f"--{name}=false")):
                    config = parse(f"python {script} {typed}")
                    assert value_of(config, flag.field) == (flag.words[on] if flag.words else on), typed
                    assert parse(spell(config)) == config
                continue
            value = other_value(base, flag.field)
            typed = "bf16" if flag.name == "amp" else value
            wanted = "bfloat16" if flag.name == "amp" else value
            for words in (["python", script, f"--{name}", str(typed)], f"{script} --{name}={shlex.quote(str(typed))}"
                          if "'" not in str(typed) else f'{script} --{name}="{typed}"'):
                config = parse([*words, *partner.split()] if isinstance(words, list) else f"{words} {partner}")
                assert value_of(config, flag.field) == wanted, words
                assert parse(spell(config)) == config


def test_any_config_comes_back_from_its_own_command():
    """parse(spell(config)) == config for random changes of random presets, hostile text included."""
    for _ in range(100):
        config = preset(random.choice(["nano", "moe-203m", "moe-top2", "dense-107m"]))
        for field in random.sample(sorted(set(FIELDS) - {"sophia_k_after", "sophia_k_switch_step"}), 12):
            try:
                config = config.replace(**{field: other_value(config, field)})
            except ConfigError:
                continue  # these two do not go together
        assert parse(spell(config)) == config
        assert parse(shlex.split(spell(config))) == config
    named = preset("nano", wandb_run_name="--resume", csv="-x.csv", dataset_name="a  b\\ ' \" | > $x")
    assert parse(spell(named)) == named


def test_the_users_first_experiment_is_their_model():
    """Their line, as it was pasted: 202,952,528 parameters, and every value where it belongs."""
    config = RunConfig.from_command(EXPERIMENT_1)
    assert count_params(config.model) == 202_952_528
    twin = preset("moe-203m", dataset_name="HuggingFaceFW/fineweb-edu", dataset_config="sample-10BT",
                  tokenizer="mistralai/Mistral-7B-v0.3", device="cuda", mirrors="wandb", router_optimizer="muon",
                  wandb_project="moe-bf16-experiments_v2", checkpoint_dir="checkpoints_moe_bf16", expert_width=None)
    assert config == twin


def test_the_shoot_out_line_is_the_dense_model():
    """Dialect 2 without its script's name: the dense twin, every optimizer, k from 10 to 20."""
    config = parse(SHOOTOUT)
    assert f"{count_params(config.model) / 1e6:.1f}" == "107.5"
    optim, data = config.optim, config.data
    assert (config.opt_list, optim.optimizer) == ("adamw,muon_adamw,muon_sophia,sophia", "adamw")
    assert (optim.sophia_k, optim.sophia_k_after, optim.sophia_k_switch_step) == (10, 20, 3500)
    assert (config.activation_checkpointing, config.compile, config.compute_dtype) == (True, True, "bfloat16")
    assert (data.dataset_name, data.dataset_config, data.val_split, data.tokenizer) == (
        "allenai/c4", "en", "validation", "gpt2")


def test_a_line_means_the_same_however_it_is_pasted():
    """Prompts, broken lines of three shells, launchers, quotes, dashes: the same config."""
    flags = ["--n_experts 8", '--wandb_run_name "my run"', "--no-dropless", "--router_noise_std_init 0.25"]
    plain = parse("python train_experimental.py " + " ".join(flags))
    unix, power, dos = (f" {mark}\n  ".join(["train_experimental.py", *flags]) for mark in "\\`^")
    joined, dashed = " ".join(flags), " ".join(flags).replace("_", "-").replace("std-init ", "std-init=")
    for line in [
            f"$ python {unix}", f"(env) user@host:~/my code$ python3 -u {unix}\n", f"PS C:\\my code> python .\\{power}",
            f"C:\\code>py {dos}".replace("\n", "\r\n"), f"python {power}".replace("`\n  ", "` \n>> "),
            f"python {unix}".replace("\n", " "), f"moe train python {unix}",
            f"CUDA_VISIBLE_DEVICES=1 torchrun --standalone --nproc_per_node 1 {unix} 2>&1 | tee a.log",
            f"cd code && source .venv/bin/activate; python {unix} > out.log", f"& python {power}",
            f"conda run -n moe python {unix}", joined, f"$ {joined}", f"> {joined}",
            f"moe train {joined}", f"python -m train_experimental {dashed}",
            f"{joined}  # don't 'use'", f"# python {unix} # best so far\n", joined.replace(" --", "\u00a0--"),
            joined.replace("--", "—"), ["moe", "train", f"$ python train_experimental.py {joined}"],
            shlex.split(f"train_experimental.py {joined}")]:
        assert parse(line) == plain, line


@pytest.mark.parametrize("line, dialect", [
    ("--n_experts 8 --dropless", EXPERIMENTAL), ("--dim 64 --n-heads 4", LAUNCH), ("--layers 2 --seed 3", DENSE),
    ("--n-experts 8", EXPERIMENTAL), ("--batch-size 4 --qk-norm", LAUNCH), ("--batch_size 4 --qk_norm", EXPERIMENTAL),
    ("--compile", EXPERIMENTAL), ("--steps 9 --device cpu --seed 1 --eval_iters 2", DENSE),
    ("python mine.py --num-experts 4", LAUNCH), ("moe train", None), ("moe train --mirrors wandb", None),
    ("--preset nano --n_experts 4", None), ("moe train runs/x --preset moe-top2 --max_steps 5", None)])
def test_flags_tell_the_dialect_where_no_script_is_named(line, dialect):
    """The rule of the module's first paragraph, case by case."""
    assert read(line).dialect == (dialect.script if dialect else "moe train")


def test_what_one_flag_implies_the_others_follow():
    """Decay follows the length and min_lr the rate where a script had no such flag; a project means W&B."""
    dense = parse("train_dense_gpu.py --steps 6000 --opt-list sophia,adamw --dataset my_texts --learning_rate 1e-4")
    assert (dense.optim.lr_decay_iters, dense.optim.optimizer, dense.optim.min_lr) == (6000, "sophia", 1e-5)
    assert (dense.data.dataset_name, dense.data.dataset_config, dense.data.val_split) == ("my_texts", None, None)
    assert parse("train_experimental.py --max_iters 6000").optim.lr_decay_iters == 2000  # it has a flag of its own
    assert [parse(f"{line}").mirrors for line in (
        "train_experimental.py", "train_experimental.py --wandb_project x", "launch_training.py --wandb-project x",
        "launch_training.py --use-wandb", "train_experimental.py --wandb_project x --mirrors trackio")] == [
        "", "wandb", "", "wandb", "trackio"]
    assert parse("moe train runs/x --preset nano --n_layer 2") == preset("nano", n_layer=2, checkpoint_dir="runs/x")
    low = parse("train_experimental.py --learning_rate 1e-6").optim, parse("--preset nano --learning_rate 1e-6").optim
    assert [optim.min_lr for optim in low] == pytest.approx([1e-7, 1e-7])
    assert parse("train_experimental.py --learning_rate 1e-4").optim.min_lr == 3e-5
    assert parse("train_experimental.py --wandb_run_name a#b --n_layer 3").wandb_run_name == "a#b"
    assert parse("train_experimental.py --d_model 60 --n_head 6").experts_impl == "loop"
    assert parse("train_experimental.py --expert_width 60").experts_impl == "loop"
    line = read(["moe", "train", "--mirrors", "trackio, wandb", "--opt_list", " sophia, adamw"])
    assert line.given == {"mirrors": "trackio,wandb", "opt_list": "sophia,adamw"}
    assert line.config.optim.optimizer == "sophia"


@pytest.mark.parametrize("line, said", [
    ("train_experimental.py --n_expert 8", "--n_expert: there is no such flag in train_experimental.py; the closest is "
                                           "--n_experts"),
    ("train_experimental.py --layers 8", "--layers: there is no such flag in train_experimental.py; the closest is "
                                         "--n_layer"),
    ("launch_training.py --n-experts-total=8", "--n-experts-total: there is no such flag in launch_training.py; the "
                                               "closest is --n-experts"),
    ("moe train --preset nano --router-tmp-init 2", "--router-tmp-init: there is no such flag; the closest is "
                                                    "--router-temp-init"),
    ("moe train --preset mini", "preset = 'mini': must be one of 'nano', 'moe-203m', 'moe-top2', 'dense-107m'"),
    ("launch_training.py --dim 0", "--dim: d_model = 0: must be at least 8"),
    ("train_experimental.py --n_layer two", "--n_layer = 'two': must be an integer"),
    ("train_experimental.py --grad_clip", "--grad_clip: must be followed by a value"),
    ("train_experimental.py --n_layer 2 3", "--n_layer: takes one value; '3' was not expected after it"),
    ("train_experimental.py --qk_norm maybe", "--qk_norm: takes no value; 'maybe' was not expected after it"),
    ("train_experimental.py --no-n_layer", "--no-n_layer: there is no such flag; --n_layer takes a value"),
    ("train_dense_gpu.py --amp fp16", "--amp = 'fp16': must be one of bf16, bfloat16, fp32"),
    ("train_dense_gpu.py --opt-list adam", "opt_list = 'adam': 'adam' must be one of adamw"),
    ("python other.py --foo 1", "other.py: must be one of train_experimental.py, train_dense_gpu.py"),
    ("please train", "please: was not expected here"),
    ('train_experimental.py --wandb_run_name "x', "command = 'train_experimental.py --wandb_run_name \"x': must have")])
def test_a_wrong_line_is_refused_in_one_line_that_names_it(line, said):
    """Unknown flags with the closest, values that are none, words that belong nowhere."""
    with pytest.raises(ConfigError) as refused:
        parse(line)
    assert str(refused.value).startswith(said) and "\n" not in str(refused.value)


def test_what_is_no_command_or_no_config_is_refused_in_one_line(tmp_path):
    """None for a line, a preset's name for a config, a path for a run."""
    with pytest.raises(ConfigError, match=r"^command = None: must be a command line"):
        RunConfig.from_command(None)
    with pytest.raises(ConfigError, match=r"^config = 'nano': must be a RunConfig"):
        Run.create(tmp_path / "run", "nano")
    with pytest.raises(TypeError, match=r"^run = 'run': must be a run, from "):
        Workbench("run")
