"""Any setting at any value, through the command line: built, or refused by a message that names the setting."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import main
from tests.support.fuzzing import BOTH, fuzz
from tests.support.runs import stage_args, write_small_scenes

#: set by somebody else: Lightning, or the parser of the command line
NOT_OURS = ("trainer.", "config", "seed_everything", "ckpt_path", "weights_only", "optimizer", "lr_scheduler", "run")
VALUES = st.sampled_from(
    ["-1", "0", "1", "1e30", "-1e-30", ".nan", ".inf", "-.inf", "null", "true", "''", "x", "99999999999999999999"]
) | st.sampled_from(["[]", "{}", "[1, 2]", "{a: 1}", "[.nan, 2]", "'\\0'", "'${data.seed}'", "!!python/name:os.system"])


def settings_of(found, before=""):
    """The places of all settings."""
    for key, value in found.items():
        if isinstance(value, dict) and value and key != "options":
            yield from settings_of(value, f"{before}{key}.")
        elif "class_path" not in key:
            yield f"{before}{key}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return stage_args(write_small_scenes(folder / "scenes"), 1, folder / "r")


@BOTH
def test_any_setting_is_built_or_refused_by_name(run, monkeypatch, capsys, tmp_path, slow):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main.StairCLI, "_run_subcommand", lambda self, subcommand: None)
    with pytest.raises(SystemExit):
        main.main([*run, "--print_config"])
    places = [place for place in settings_of(yaml.safe_load(capsys.readouterr().out)) if not place.startswith(NOT_OURS)]
    assert len(places) > 50

    @fuzz(4, slow)
    @given(place=st.sampled_from(places), value=VALUES, known=st.integers(0, 9))
    def tried(place, value, known):
        place = place if known else f"{place}s_"  # now and then one that is not there
        try:
            main.main([*run, f"--{place}={value}"])
        except SystemExit as end:
            output = capsys.readouterr().err.rpartition("error: ")[2]  # not its usage, which names every setting
            assert end.code == 2 and place.rpartition(".")[2] in output, output
        except ValueError as error:
            assert place.rpartition(".")[2] in str(error), (place, value, error)
        except OSError as error:  # of files and folders the message names the place that was given
            assert value.strip("'") in str(error), (place, value, error)
        capsys.readouterr()

    tried()
