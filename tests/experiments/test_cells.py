"""Rows of the protocol, their cells and ids, and the commands that run them."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from smoke_tables import PROTOCOL, SMOKE, rows_of

import train_step1
import train_step2
from baselines.settings import MethodConfig
from experiments import cells as cells_module
from experiments import jobs as jobs_module
from experiments.cells import all_cells, expand
from experiments.protocol import HERE, Setup, find_setup, load_protocol, pair_of
from experiments.records import publish, read_records
from experiments.runner import folder_of
from utils.engine.run_log import REPOSITORY
from utils.errors import UserError
from utils.settings.config import load_config
from utils.settings.options import Step1Config, Step2Config


def ids(rows):
    return {cell.id for cell in all_cells(rows)}


def test_every_table_expands_on_every_data_set():
    for dataset, entry in PROTOCOL["datasets"].items():
        for scale in set(entry) & {"full", "small"}:
            setup = find_setup(PROTOCOL, dataset, scale)
            assert (REPOSITORY / setup.config / "step2.yaml").is_file() and entry["paper"] == setup.paper
            one = dataclasses.replace(setup, pairs=setup.pairs[-1:])
            assert len(all_cells(rows_of("table8", one))) == 8
    printed = dataclasses.replace(SMOKE, as_printed=dataclasses.replace(SMOKE, step2=("rdl.lambda_2=0.25",)))
    found = {name: len(all_cells(rows_of(name, printed))) for name in PROTOCOL["tables"]}
    assert found.pop("table2") >= 12 and found.pop("table3") >= 12  # docs/comparison.md says how to add rows
    assert found == {
        "headline": 4, "unpaired": 0, "recipe": 2, "ablation": 19, "stages": 3, "clip": 3, "estimators": 4, "tasks": 6, "table2-romo": 2, "table4": 10, "table6": 15,
        "table8": 8, "table2-variants": 0, "table2-rate": 5, "rono-noise": 15, "rono-ablation": 12, "table9": 1, "fig3": 1, "fig4": 26, "fig5": 7, "fidelity": 8,
    }
    with pytest.raises(UserError, match="needs as_printed of digits"):
        rows_of("headline")
    (cell,) = rows_of("tasks")[5].cells[0].values()
    assert "data.modalities=[RGBImg,GrayImg,PointCloud,Mesh]" in cell.arguments


def test_end_to_end_every_method_trains_with_the_settings_of_romo():
    setup = find_setup(PROTOCOL, "mnist3d", "full")
    rows = {row.name: row for row in expand(PROTOCOL["tables"]["table2"], setup, [0])}
    assert rows["UCCH"].setup == rows["RoMo, ours"].setup and rows["UCCH"].setup["config"] == "configs/mnist3d"
    assert "configs/mnist3d/step1.yaml" in rows["UCCH"].cells[0]["GP"].arguments


def test_rows_and_tables_share_step_1_and_equal_cells():
    rows = {row.name: row.cells[0]["GP"] for row in rows_of("table4")}
    assert len({cell.needs for cell in rows.values()}) == 1 and len({cell.id for cell in rows.values()}) == 9
    (first,) = rows["CE"].needs
    assert rows_of("table2-romo")[0].cells[0]["GP"] == first
    shared = {name: ids(rows_of(name)) for name in ("table4", "table6", "table8", "fig4", "fig5")}
    for other in ("table6", "table8", "fig4", "fig5"):
        assert {first.id, rows["RCLL"].id} <= shared[other]  # 0.25 and 0.3 of the grids are the configuration's own values
    assert rows["CE"].id in shared["fig5"]
    order = [cell.id for cell in all_cells(rows_of("table4", seeds=(0, 1)))]
    assert len(order) == 20 and order.index(first.id) == 0


def test_an_id_depends_on_what_decides_the_result_and_on_nothing_else(tmp_path):
    def cell(overrides=(), seed=0, text=None, stage="step2"):
        folder = Path("configs/smoke") if text is None else tmp_path
        for name in ("step1", "step2") if text is not None else ():
            (folder / f"{name}.yaml").write_text(f"{text}extends: {REPOSITORY}/configs/smoke/{name}.yaml\n")
        setup = Setup("digits", "small", folder, ("GP",), **{stage: tuple(overrides)})
        return expand({"rows": {"row": {}}}, setup, [seed])[0].cells[seed]["GP"]

    plain = cell()
    assert cell().id == plain.id and cell(text="# a comment\n").id == plain.id
    assert cell(["rdl.loss=rcll"]).id == plain.id  # the default, said aloud
    assert cell(["run.device=cuda:0", "run.threads=2", "run.figures=true", "run.output=elsewhere"]).id == plain.id
    different = [
        cell(seed=1), cell(["rdl.loss=ce"]), cell(["run.amp=true"]), cell(["pla.lambda_1=0.5"], stage="step1"),
        cell(["data.views={RGBImg: 2, GrayImg: 2}"]),  # the default, of which the configuration has emptied the dictionary
    ]
    assert len({plain.id, *(entry.id for entry in different)}) == 6
    assert different[3].needs[0].id != plain.needs[0].id  # other pseudo-labels, so another step 2
    assert different[0].needs[0].seed == 1


def test_a_setting_that_comes_later_changes_no_id(monkeypatch):
    setup = Setup("digits", "full", Path("configs/digits"), ())
    before, to_dict = cells_module.describe_setup(setup)["hash"], cells_module.to_dict

    def later(config):  # every class of settings, and one of its own classes, has one more
        tree = to_dict(config) | {"new": 1}
        return tree | {"augment": tree["augment"] | {"new": 1}} if "augment" in tree else tree

    def read_later(config):
        return {name: later(getattr(config, name)) for name in to_dict(config)} if hasattr(config, "data") else later(config)

    monkeypatch.setattr(cells_module, "to_dict", read_later)
    assert cells_module.describe_setup(setup)["hash"] == before
    given = dataclasses.replace(setup, step2=("rdl.alpha=0.2",))
    assert cells_module.describe_setup(given)["hash"] != before


def test_placeholders_and_tasks():
    setup = find_setup(PROTOCOL, "modelnet10", "small", ["PR", "RP", "MG"])
    assert setup.pairs == ("RP", "GM") and pair_of("MR") == "RM"
    cells = {row.name: row.cells[0] for row in rows_of("table8", setup)}
    assert "pla.banks=[GrayImg]" in cells["bank of 2D alone, after PLA"]["GM"].arguments
    assert "pla.banks=[PointCloud]" in cells["bank of 3D alone"]["RP"].needs[0].arguments
    assert "optim.epochs=10" in cells["no bank"]["RP"].arguments and cells["no bank"]["RP"].epochs == 10
    for task in ("RG", "PM", "R", "XP"):
        with pytest.raises(ValueError, match="one letter of R, G"):
            pair_of(task)


def test_an_added_file_brings_data_sets_tables_and_rows(tmp_path):
    added, own = tmp_path / "mine.yaml", ["data.dataset=shapes"]
    added.write_text(yaml.safe_dump({
        "datasets": {"shapes": {"small": {"config": "configs/smoke", "step1": own, "step2": own}}},
        "tables": {"table4": {"rows": {"GCE, more of it": {"step2": ["rdl.loss=gce", "rdl.lambda_2=0.5"]}}},
                   "mine": {"title": "mine", "rows": {"one": {}}}},
    }))
    protocol = load_protocol(added)
    setup = find_setup(protocol, "shapes", "small")
    assert setup.pairs == ("GP",) and setup.paper is None  # the pair of the configuration
    names = [row.name for row in expand(protocol["tables"]["table4"], setup, [0])]
    assert names[0] == "RCLL" and names[-1] == "GCE, more of it" and len(protocol["tables"]["mine"]["rows"]) == 1
    assert find_setup(protocol, "smoke", "full").config == Path("configs/smoke")  # a folder of configs/ is enough
    for text, message in (("{rows: {GCE: {step3: []}}}", "rows.GCE: unknown key 'step3', did you mean"),
                          ("{baseline: nothing}", "compared with 'nothing'"), ("{rows: {GCE: {by: luck}}}", "ranked by 'luck'; known: embedding; "), ("{rows: {GCE: {against: none}}}", "compared with 'none'")):
        added.write_text(f"tables: {{table4: {text}}}")
        with pytest.raises(UserError, match=message):
            load_protocol(added)


def started(folder):
    """A run in a cell's folder, as one that was interrupted."""
    run = folder / "runs/digits/stage/x"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    return run


def test_commands(tmp_path):
    (cell,) = [row.cells[0]["GP"] for row in rows_of("table4") if row.name == "CE"]
    folder, before = tmp_path / "cells/abc", started(tmp_path / "cells" / cell.needs[0].id)
    line = jobs_module.command(cell, folder, "cuda:1")
    assert line[:3] == ["train_step2.py", "--config", "configs/smoke/step2.yaml"] and {"rdl.loss=ce", "run.device=cuda:1"} <= set(line)
    assert line[-2:] == ["--from", str(before)]
    assert not [part for part in line if part.startswith("run.threads")]
    assert "run.threads=1" in jobs_module.command(cell, folder, "cpu")
    run = started(tmp_path)
    assert jobs_module.command(cell, tmp_path, "cpu") == ["train_step2.py", "--resume", str(run)]
    release = rows_of("fidelity")[1].cells[0]["GP"]
    line = jobs_module.command(release, folder, "cpu")
    assert line[:6] == ["-m", "baselines.release_protocol", "--config-dir", "configs/smoke", "--variant", "oracle_labels"]
    assert line[-8:] == ["--seed", "0", "--device", "cpu", "--threads", "1", "--output", str(folder)]


def test_step_1_again_two_rounds_and_a_ranking_of_its_own(tmp_path, small_digits):
    """A row's cells, run by their commands: each starts from the one before."""
    own = (f"data.root={small_digits}", "optim.epochs=2")
    setup = Setup("digits", "small", Path("configs/smoke"), ("GP",), step1=own, step2=own)
    options = {"again": ["pla.num_clusters=4", "pla.fuse=trusted"], "step2": ["rdl.start=inherited"], "rounds": 2, "by": "posterior, diffusion"}
    table = {"rows": {"the row": options, "one round": {**options, "rounds": 1, "by": None}}}
    rows = expand(table, setup, [0])
    last = rows[0].cells[0]["GP"]
    cells = [*last.rests_on(), last]
    assert cells == all_cells(rows) and [cell.stage for cell in cells] == ["step1", "step1", "step2", "step2"]
    folders = {cell: folder_of(cell, tmp_path) for cell in cells}
    for cell, folder in folders.items():
        script, *arguments = jobs_module.command(cell, folder, "cpu")
        {"train_step1.py": train_step1, "train_step2.py": train_step2}[script].main(arguments)
    runs = [next(folder.glob("runs/*/*/*")) for folder in folders.values()]
    for before, run in zip(runs, runs[1:]):
        assert f"initial weights of every encoder: {before / 'last.pt'}" in (run / "log.txt").read_text()
    publish(tmp_path / "mine.jsonl", rows, {cell.id: jobs_module.collect(cell, folder) for cell, folder in folders.items()}, "a call")
    records = {(record["row"], record["id"]): record for record in read_records(tmp_path / "mine.jsonl")}
    assert records.keys() == {("the row", cells[3].id), ("one round", cells[2].id), *((None, cell.id) for cell in cells[:3])}
    assert [records[None, cell.id]["epochs"] for cell in cells[:3]] == [2, 0, 2]
    shown, metrics = records["the row", cells[3].id], json.loads((runs[3] / "metrics.json").read_text())
    assert shown["scores"]["map/avg"] == metrics["variants"]["posterior, diffusion"]["map/avg"] and "variants" not in shown
    assert records["one round", cells[2].id]["scores"]["map/avg"] == json.loads((runs[2] / "metrics.json").read_text())["map/avg"]
    assert metrics["map/avg"] == metrics["variants"]["embedding"]["map/avg"] != shown["scores"]["map/avg"]


def test_the_papers_numbers_have_the_rows_that_the_protocol_names():
    numbers = yaml.safe_load((HERE / "paper.yaml").read_text())
    for name, table in PROTOCOL["tables"].items():
        for row in table.get("rows", {}).values():
            for tasks in numbers[table["paper"]].values() if "paper" in row else ():
                assert all(row["paper"] in values for values in tasks.values()), (name, row)
    assert numbers["comparison"]["3D MNIST"]["RP"]["RoMo"] == numbers["robust_losses"]["3D MNIST"]["RP"]["RoMo"] == 0.849
    for dataset, tasks in numbers["ablation"].items():
        assert {task: values["row_9"] for task, values in tasks.items()} == {
            task: values["RoMo"] for task, values in numbers["comparison"][dataset].items()}
    assert numbers["bank_cost"]["3D MNIST"]["mib"] == pytest.approx(5000 * 1024 * 4 / 2**20, abs=1e-3)


def test_the_comparison_trains_every_row_of_a_seed_on_the_same_features():
    setup = find_setup(PROTOCOL, "mnist3d", "head")
    rows = {row.name: row.cells for row in rows_of("table2", setup, (0, 1))}
    assert setup.letters == "RGP" and set(rows["UCCH"][0]) == {"RP", "GP"} and set(rows["MCCA"][0]) == {"RGP"}
    chains = {name: [need for cell in cells[0].values() for need in cell.rests_on()] for name, cells in rows.items()}
    learned = {need.id for name, needs in chains.items() for need in needs if need.stage == "features" and len(need.name.split()) == 4}
    assert len(learned) == 1 and all({need.stage for need in needs} & {"features"} for needs in chains.values())
    assert [need.stage for need in rows["RoMo, ours"][0]["GP"].rests_on()] == ["features", "step1"]
    assert rows["CCA, untrained features"][0]["GP"].needs[0].name == "features RGP seed 0 random"
    assert rows["UCCH"][0]["GP"].id not in {rows["UCCH"][1]["GP"].id, rows["UCCH"][0]["RP"].id, rows["DGCPN"][0]["GP"].id}
    order = [cell.id for cell in all_cells(rows_of("table2", setup))]
    assert all(order.index(need.id) < order.index(cell.id) for cells in rows.values() for cell in cells[0].values() for need in cell.rests_on())
    assert not any(row.cells[0] for row in rows_of("table3", find_setup(PROTOCOL, "mi3dor", "head")))
    for dataset, task in (("modelnet10", "MR"), ("mi3dor", "RM"), ("rgbd_object", "GP")):
        with pytest.raises(UserError, match=f"--tasks {task}: the data of {dataset} for it cannot be had"):
            find_setup(PROTOCOL, dataset, "head", ["RP", task] if dataset == "modelnet10" else [task])


def test_a_method_end_to_end_trains_as_long_as_both_stages_and_is_another_one_where_they_are_longer():
    setup = find_setup(PROTOCOL, "digits", "full", ["GP"])
    setups = setup, dataclasses.replace(setup, step2=("optim.epochs=3",))
    rows, longer = ({row.name: row.cells[0] for row in rows_of("table2", found)} for found in setups)
    ours = dataclasses.replace(find_setup(PROTOCOL, "digits", "head"), step1=("optim.epochs=30",))
    (cell,) = next(row for row in rows_of("table2", ours) if row.name == "CCA").cells[0].values()
    assert cell.epochs == 0 and not any("optim" in text for text in cell.arguments)  # which are RoMo's, and which CCA refuses
    assert not {"CCA", "RoMo, paper's settings"} & rows.keys() and [need.stage for need in rows["UCCH"]["GP"].needs] == ["features"]
    epochs = [load_config(cls, f"configs/digits/{stage}.yaml").optim.epochs for stage, cls in (("step1", Step1Config), ("step2", Step2Config))]
    assert rows["UCCH"]["GP"].epochs == sum(epochs) and f"optim.epochs={sum(epochs)}" in rows["UCCH"]["GP"].arguments and rows["UCCH"]["GP"].id != longer["UCCH"]["GP"].id


@pytest.mark.parametrize("dataset,classes", [("digits", 10), ("mnist3d", 10), ("modelnet10", 10), ("modelnet40", 40)])
def test_pseudo_labels_are_more_than_the_classes(dataset, classes):
    rows = {row.name: row.cells[0] for row in rows_of("table2", find_setup(PROTOCOL, dataset, "head"))}
    given = lambda cell: [text.partition("=")[2] for text in cell.arguments if "num_clusters=" in text]
    for name in ("RevGrad", "MEDA", "PT-FUCH"):
        assert all(int([str(MethodConfig().num_clusters), *given(cell)][-1]) >= 2 * classes for cell in rows[name].values())
    printed = [need for cell in rows["RoMo, paper's settings"].values() for need in cell.rests_on() if need.stage == "step1"]
    assert printed and all(int(["20", *given(cell)][-1]) >= 2 * classes for cell in printed)


def test_commands_read_the_features_of_the_cell_that_made_them(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs_module, "REPOSITORY", tmp_path)
    row = {entry.name: entry for entry in rows_of("table2", find_setup(PROTOCOL, "digits", "head"))}
    cells = Path("runs/cells")
    for name, words in (("UCCH", ["-m", "baselines.run", "ucch"]), ("RoMo, ours", ["train_step2.py"])):
        cell = row[name].cells[0]["GP"]
        features = next(need for need in cell.rests_on() if need.stage == "features")
        folder = cells / features.id / "features"
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "features.json").write_text('{"settings": ["data.dataset=digits_features", "data.features.GrayImg=9"]}')
        line = jobs_module.command(cell, cells / cell.id, "cpu")
        assert line[: len(words)] == words and {f"data.root={folder}", "data.features.GrayImg=9", "run.threads=1"} <= set(line)
    row = {entry.name: entry for entry in rows_of("table2", find_setup(PROTOCOL, "digits", "full", ["GP"]))}
    cell = row["DJSRH"].cells[0]["GP"]
    line = jobs_module.command(cell, cells / cell.id, "cpu")  # end to end they are for its targets alone
    assert f"method.features={cells / cell.needs[0].id / 'features'}" in line and not any(word.startswith("data.root") for word in line)
    made = jobs_module.command(features, cells / features.id, "cpu")
    assert made[:2] == ["-m", "baselines.features"] and made[-2:] == ["--out", str(folder)] and made[made.index("--kind") + 1] == "learned"
    run = started(tmp_path / cells / features.id).relative_to(tmp_path)
    assert jobs_module.command(features, cells / features.id, "cpu")[-4:] == ["--resume", str(run), *made[-2:]]
