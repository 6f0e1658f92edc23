"""Statistics over seeds, and records rendered as tables, figures and documents."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from smoke_tables import CLEAN, PROTOCOL, SMOKE, rows_of

from experiments import documents
from experiments.cells import expand
from experiments.jobs import collect
from experiments.protocol import find_setup
from experiments.records import add_records, load_table, publish, read_records
from experiments.summary import compare, estimate
from experiments.tables import render, table_lines
from utils.engine.run_log import REPOSITORY


@pytest.mark.parametrize("values", [[0.1, 0.2], [0.78, 0.79, 0.77], list(np.random.default_rng(0).random(9))])
def test_intervals_are_scipys(values):
    found = estimate(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.mean == pytest.approx(np.mean(values)) and found.std == pytest.approx(np.std(values, ddof=1))
    assert estimate(values[:1]).std is None and estimate(values[:1]).low is None


@pytest.mark.parametrize("ours,mean,verdict", [
    ({0: 0.72, 1: 0.821, 2: 0.771}, 0.062 / 3, "better"),  # small differences that agree, although the seeds differ by 0.1
    ({0: 0.68, 1: 0.779, 2: 0.729}, -0.062 / 3, "worse"), ({0: 0.75, 1: 0.80, 2: 0.76}, 0.02, "within noise"),
    ({0: 0.70, 1: 0.80, 2: 0.75}, 0.0, "within noise"), ({0: 0.9, 1: 0.9, 5: 0.9}, None, "n/a"),
])
def test_paired_comparison(ours, mean, verdict):
    base = {0: 0.70, 1: 0.80, 2: 0.75}
    found = compare(ours, base)
    assert found.verdict == verdict and found.mean == (None if mean is None else pytest.approx(mean)) and found.n == 2 + (mean is not None)
    if mean:
        low, high = scipy.stats.ttest_rel(list(ours.values()), list(base.values())).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high))


def lines_of(rows, score, dirty=lambda row, cell: False, absent=(), letters="GP"):
    """A record of every cell; score(row name, seed) is the mAP of GP, and 0.02 more that of PG."""
    entries = [(row, seed, pairs[letters]) for row in rows if row.name not in absent for seed, pairs in row.cells.items()]
    return [{
        "row": row.name if entry is cell else None, "pair": letters, "setup": row.setup, "id": entry.id, "stage": entry.stage,
        "seed": seed, "needs": [need.id for need in entry.needs], "seconds": 60.0, **CLEAN, "dirty": dirty(row.name, entry),
        "scores": {f"map/{letters}": score(row.name, seed), f"map/{letters[::-1]}": score(row.name, seed) + 0.02, "map/chance": 0.117,
                   "clipped": 0.05},
        "epochs": 2, "curve": {"epoch": [1, 2], "map/avg": [0.1, score(row.name, seed)]},
        "command": f"python train_{entry.stage}.py", "call": "python reproduce.py",
    } for row, seed, cell in entries for entry in (*cell.needs, cell)]


def rendered(folder, table, lines, protocol=PROTOCOL, stem="{}-digits-small"):
    path = folder / f"{stem.format(table)}.jsonl"
    add_records(path, lines)
    render(path, protocol)
    text = path.with_suffix(".md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return text, {line[0]: dict(zip(rows[0], line)) for line in rows[2:]}


def test_a_table_with_clean_dirty_and_missing_cells(tmp_path):
    level = {"RCLL": 0.78, "CE": 0.70, "MAE": 0.781, "GCE": 0.79, "AUE": 0.6}
    bumps = {"MAE": (0.03, -0.03, 0.0), "GCE": (0.001, 0.0, 0.002)}
    score = lambda name, seed: level.get(name, 0.5) + 0.01 * seed + bumps.get(name, (0, 0, 0))[seed]
    dirty = lambda name, cell: cell.stage == "step2" and (name == "AUE" or (name == "CE" and cell.seed == 2))
    text, found = rendered(tmp_path, "table4", lines_of(rows_of("table4", seeds=(0, 1, 2)), score, dirty, absent=("NCE+AGCE",)))
    expected = {
        "chance": {"avg": "11.7"},
        "RCLL": {"GP": "79.0 ± 1.0", "GP, paper (3D MNIST)": "84.3", "avg": "80.0 ± 1.0 [77.5, 82.5]",
                 "avg, paper (3D MNIST)": "84.1", "avg, difference": "", "seeds": "0, 1, 2", "wall time": "2.0 min",
                 "commit": "`aaaaaaa`"},
        "CE": {"avg, difference": "n/a", "seeds": "0, 1; dirty tree: 2"},
        "AUE": {"GP": "dirty tree", "avg": "dirty tree", "seeds": "dirty tree: 0, 1, 2"},
        "NCE+AGCE": {"avg": "not run", "seeds": "not run: 0, 1, 2"},
    }
    assert {name: {head: found[name][head] for head in cells} for name, cells in expected.items()} == expected
    assert found["GCE"]["avg, difference"].startswith("+1.1 [") and found["MAE"]["avg, difference"].startswith("within noise (+0.1 [")
    facts = ", ".join(f"{key.split('_size')[0].replace('_rate', ' rate')} {value:g}" for key, value in rows_of("table4")[0].setup.items()
                      if isinstance(value, (int, float)) and key != "num_clusters") + ", K 6 given"
    for words in (
        "- Order of the means, ours: GCE > MAE > RCLL > CE", "- Order of the means, paper: RCLL > GCE > NCE+AGCE > AUE > MAE > CE",
        "better: GCE", "within noise: MAE", "; fewer than 3 seeds: CE",
        f"- Settings: ours, not the paper's (`configs/smoke`): 2 + 2 epochs, {facts}\n- Device: a CPU, 1 thread\n\n| row |",
    ):
        assert words in text and "device" not in found["RCLL"]
    other = [{**line, "device": "a GPU", "threads": None} for line in lines_of(rows_of("table4"), score) if line["row"] == "CE"]
    text, found = rendered(tmp_path, "table4", other)
    assert "- Device" not in text and (found["RCLL"]["device"], found["CE"]["device"]) == ("a CPU, 1 thread", "a CPU, 1 thread; a GPU")


def test_a_dirty_or_missing_step_1_makes_its_step_2_dirty_or_missing(tmp_path):
    lines = lines_of(rows_of("table2-romo"), lambda name, seed: 0.7, dirty=lambda name, cell: cell.stage == "step1")
    for kept, state in ((lines, "dirty tree"), ([line for line in lines if line["stage"] == "step2"], "not run")):
        _, found = rendered(tmp_path / state, "table2-romo", kept)
        assert found["after RDL"]["avg"] == state


def test_tasks_of_several_pairs_and_of_more_modalities(tmp_path):
    both = rows_of("table2-romo", dataclasses.replace(SMOKE, pairs=("RP", "GP")))
    score = lambda name, seed: 0.6
    lines = lines_of(both[:1], score, letters="RP") + lines_of(both, score, letters="GP")
    text, found = rendered(tmp_path, "table2-romo", lines, stem="{}-smoke-small")
    assert "paper" not in text.splitlines()[4] and "smoke, small scale" in text
    assert found["after PLA"]["avg"] == "61.0" and found["after PLA"]["PR"] == "62.0"
    assert found["after RDL"]["GP"] == "60.0" and found["after RDL"]["RP"] == "not run" and found["after RDL"]["avg"] == "not run"
    tasks = {row.name: row for row in rows_of("tasks")}
    name = "step 1, PLA (class estimator), R+G+P at once"
    pair, three = tasks["step 1, PLA (class estimator)"], lines_of([tasks[name]], score, letters="RGP")
    three[0]["scores"] = {"map/RP": 0.5, "map/PR": 0.5, "map/GP": 0.7, "map/PG": 0.7, "map/RG": 0.9, "map/GR": 0.9}
    _, found = rendered(tmp_path, "tasks", three + lines_of([pair], score))
    assert found[name]["avg"] == "60.0" and found[name]["RG"] == "90.0"  # the mean is over 2D-3D tasks alone
    assert found[pair.name]["RP"] == "" and found[pair.name]["avg"] == "61.0"


@pytest.mark.parametrize("table,row,task,number", [
    ("table8", "no bank", "avg", "76.4"), ("table8", "both banks, after PLA", "avg", ""), ("table6", "full", "PG", "83.9"),
    ("table6", "RDL without L_mlm", "GP", "11.7"), ("table6", "PLA without L_ssm", "GP", ""),
])
def test_the_papers_number_beside_a_row(tmp_path, table, row, task, number):
    """Table VIII prints averages; not every row of ours is one of the paper's."""
    assert rendered(tmp_path, table, [])[1][row][f"{task}, paper (3D MNIST)"] == number


def test_the_headline_shows_the_paper_beside_both_settings(tmp_path):
    _, found = rendered(tmp_path, "headline", [])
    assert (found["paper, Table II"]["GP"], found["paper, Table II"]["avg"]) == ("84.3", "84.1")
    assert found["ours, step 2"]["GP"] == found["as printed, step 2"]["avg"] == "not run"
    printed = dataclasses.replace(SMOKE, config=Path("configs/digits"))
    lines = lines_of(rows_of("headline", dataclasses.replace(SMOKE, as_printed=printed))[2:], lambda name, seed: 0.6 + 0.1 * ("ours" in name))
    for line in lines:
        line["setup"] = {**line["setup"], "config": line["setup"]["config"].replace("digits", "mnist3d_paper_cpu")}
    text, found = rendered(tmp_path, "headline", lines)
    assert found["ours, step 2"]["GP"] == "70.0" and found["as printed, step 2"]["GP"] == "60.0"
    assert "- Settings: the paper's as printed, inputs and encoders in CPU size (`configs/mnist3d_paper_cpu`): 2 + 2 epochs" in text


def test_a_table_never_joins_settings_and_keeps_every_record(tmp_path):
    old = lines_of(rows_of("clip", seeds=(0, 1)), lambda name, seed: 0.5)
    for line in old:  # as recorded before a key was renamed
        line |= {"id": f"old-{line['id']}", "needs": [f"old-{need}" for need in line["needs"]], "setup": {**line["setup"], "hash": None},
                 "command": "python train_step2.py --set rdl.warmup_epochs=0"}
    assert rendered(tmp_path, "clip", old)[1]["step 2, RDL"]["seeds"] == "0, 1"
    new = [line for line in lines_of(rows_of("clip"), lambda name, seed: 0.7) if line["row"] in (None, "step 2, RDL")]
    for _ in range(2):  # the same records again change nothing
        _, found = rendered(tmp_path, "clip", new)
        assert found["step 2, RDL"]["GP"] == "70.0" and found["step 2, RDL"]["seeds"] == "0" and found["step 2, RDL"]["clipped"] == "5.0"
        assert found["step 2, RDL, clipped from the start"]["GP"] == "not run"
        kept = read_records(tmp_path / "clip-digits-small.jsonl")
        assert [line for line in old if line not in kept] == [] and len(kept) == len({json.dumps(line) for line in old + new})


@pytest.mark.parametrize("table", ["fig4", "fig5"])
def test_figures_are_drawn_of_clean_cells_only(tmp_path, table):
    protocol = {**PROTOCOL, "tables": {table: {**PROTOCOL["tables"][table], "values": [0.25, 0.5]}}}
    rows = expand(protocol["tables"][table], SMOKE, (0, 1))
    picture = tmp_path / f"{table}-digits-small.png"
    text, found = rendered(tmp_path, table, [], protocol)
    assert "figure: not run" in text and not picture.exists() and found[rows[0].name]["avg"] == "not run"
    lines = lines_of(rows, lambda name, seed: 0.7 + 0.01 * seed, dirty=lambda name, cell: True)
    assert "figure: dirty tree" in rendered(tmp_path, table, lines, protocol)[0]
    text, _ = rendered(tmp_path, table, [{**line, "dirty": False} for line in lines], protocol)
    assert f"]({picture.name})" in text and picture.read_bytes().startswith(b"\x89PNG")


def test_tasks_without_data_stay_in_the_comparison(tmp_path):
    def cells(dataset, row, protocol=PROTOCOL, table="table3"):
        path = tmp_path / f"{table}-{dataset}-head.jsonl"
        render(path, protocol)
        head, *rows = [line.strip("| ").split(" | ") for line in path.with_suffix(".md").read_text().splitlines() if line.startswith("| ")]
        return dict(zip(head, next(found for found in rows if found[0] == row)))

    found = cells("rgbd_object", "RONO 0.2", table="rono-noise")
    assert found["RP"] == found["avg"] == "not run: data" and found["PR, paper (RGB-D object)"] == "77.1"
    found = cells("mi3dor", "UCCH")
    assert found["RM"] == found["GM"] == found["avg"] == "not run: data" and found["RM, paper (MI3DOR)"] == "66.7"
    found = cells("modelnet40", "UCCH")
    assert found["RM"] == found["MG"] == "not run: data" and found["RP"] == found["avg"] == "not run"
    assert found["avg, paper (ModelNet40)"] == "75.4"  # without meshes, as ours would be; with them it is 76.4
    order = (tmp_path / "table3-modelnet40-head.md").read_text().partition("means, paper: ")[2].splitlines()[0].split(" > ")
    assert order[1:4] == ["SCL", "PT-FUCH", "UCCH"]  # of the tasks that can be run; with those of meshes UCCH is first
    rows = [row for row in expand(PROTOCOL["tables"]["table3"], find_setup(PROTOCOL, "modelnet40", "head"), [0]) if row.name == "UCCH"]
    add_records(tmp_path / "table3-modelnet40-head.jsonl", lines_of(rows, lambda name, seed: 0.7))
    found = cells("modelnet40", "UCCH")
    assert (found["avg"], found["avg, paper (ModelNet40)"], found["GM, paper (ModelNet40)"]) == ("71.0", "76.0", "77.8")  # of GP and PG


def test_rows_of_methods_that_read_labels_are_marked(tmp_path):
    """Whether the record says so, or is of a time when it held only what the method reads; once, and no other row."""
    setup, reads = find_setup(PROTOCOL, "digits", "head"), {"RONO 0.2": "labels, 0.2 of them wrong (symmetric)", "MRL 0.4": "source labels"}
    rows = [row for row in expand(PROTOCOL["tables"]["rono-noise"], setup, [0]) if row.name in (*reads, "UCCH", "RONO 0.4")]
    rows += [row for row in expand(PROTOCOL["tables"]["table2"], setup, [0]) if row.name == "MRL, READS LABELS, 20 % wrong"]
    done = {}
    reads["MRL, READS LABELS, 20 % wrong"] = reads["RONO 0.2"]
    for row, cell in ((row, cell) for row in rows for cell in row.cells[0].values()):
        place = tmp_path / cell.id / "runs" / "digits" / "baseline" / "run"
        place.mkdir(parents=True, exist_ok=True)
        (place / "config.yaml").write_text("")
        said = {"reads": reads.get(row.name, "none"), **({"reads_labels": "noisy labels of digits"} if row.name == "RONO 0.4" else {})}
        (place / "metrics.json").write_text(json.dumps({"map/GP": 0.5, "map/PG": 0.5, "seconds": 1.0, "peak_mib": None, "mode": "head", **said}))
        features = {need.id: {"id": need.id, "stage": "features", "seed": 0, "needs": [], "scores": {}, **CLEAN} for need in cell.needs}
        done |= features | {cell.id: collect(cell, tmp_path / cell.id) | CLEAN}
    publish(tmp_path / "rono-noise-digits-head.jsonl", rows, done, "python reproduce.py")
    lines = table_lines(load_table(tmp_path / "rono-noise-digits-head.jsonl", PROTOCOL))
    names = {line.split(" | ")[0].strip("| ") for line in lines if "| 50.0 |" in line}
    assert names == {"RONO 0.2, READS LABELS", "MRL 0.4, READS LABELS", "UCCH", "RONO 0.4, READS LABELS", "MRL, READS LABELS, 20 % wrong"}


def test_sign_codes_of_several_pairs_are_averaged(tmp_path):
    setup = find_setup(PROTOCOL, "mnist3d", "head")
    rows = [row for row in expand(PROTOCOL["tables"]["table2"], setup, [0, 1]) if row.name == "UCCH"]
    lines = [line for letters in setup.pairs for line in lines_of(rows, lambda name, seed: 0.7, letters=letters)]
    for line in lines:
        line["scores"]["sign/avg"] = {"RP": 0.5, "GP": 0.6}[line["pair"]] + 0.1 * line["seed"]
    text, _ = rendered(tmp_path, "table2", lines, stem="{}-mnist3d-head")
    (row,) = [line for line in text.splitlines() if line.startswith("| UCCH ")]
    assert "sign/avg" in text and f"{np.mean([55, 65]):.1f} ± {np.std([55, 65], ddof=1):.1f}" in row


def test_titles_and_settings_say_what_the_data_and_the_clusters_are(tmp_path):
    setup = find_setup(PROTOCOL, "modelnet10", "e2e")
    assert setup.config.name == "modelnet10_splat" and setup.absent == ("RM", "GM")
    rows = [row for row in expand(PROTOCOL["tables"]["table2"], setup, [0]) if row.name == "UCCH"]
    rows += [row for row in expand(PROTOCOL["tables"]["table2"], setup, [0]) if row.name == "RoMo, ours"]
    text, _ = rendered(tmp_path, "table2", [line for letters in setup.pairs for line in lines_of(rows, lambda name, seed: 0.7, letters=letters)], stem="{}-modelnet10-e2e")
    assert "modelnet10, e2e scale, splat pictures drawn from the points, not the paper's" in text
    assert "not run: data" in text and "alpha 0.25, K found" in text


def test_the_orders_are_compared_by_kendalls_tau(tmp_path):
    scores = {"RCLL": 0.9, "CE": 0.1, "MAE": 0.2, "GCE": 0.8, "AUE": 0.3, "NCE+AGCE": 0.4}
    text, _ = rendered(tmp_path, "table4", lines_of(rows_of("table4"), lambda name, seed: scores.get(name, 0.5)))
    paper = {"RCLL": 0.841, "CE": 0.7745, "MAE": 0.7975, "GCE": 0.8275, "AUE": 0.8135, "NCE+AGCE": 0.8175}
    agree = [np.sign((scores[a] - scores[b]) * (paper[a] - paper[b])) for a in scores for b in scores if a < b]
    assert f"Kendall's tau between both orders, 6 rows: {sum(agree) / len(agree):.2f}" in text


def test_documents_are_rendered_from_the_records_alone(tmp_path):
    expected, _ = rendered(tmp_path, "table4", lines_of(rows_of("table4"), lambda name, seed: 0.7))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("a\n<!-- table: table4-digits-small -->\nstale\n<!-- end -->\nb\n")
    (tmp_path / "docs" / "speed.md").write_text("<!-- benchmark: nothing -->\n9.9\n<!-- end -->\n")
    documents.rewrite(tmp_path, tmp_path, PROTOCOL)
    assert (tmp_path / "README.md").read_text() == f"a\n<!-- table: table4-digits-small -->\n{expected}<!-- end -->\nb\n"
    assert (tmp_path / "docs" / "speed.md").read_text() == "<!-- benchmark: nothing -->\nnot run\n<!-- end -->\n"


def test_the_documents_show_what_is_recorded(tmp_path):
    """`reproduce.py render` would change nothing: no number in a table of a document is typed by hand."""
    documents_here = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    (tmp_path / "docs").mkdir()
    for document in documents_here:
        (tmp_path / document.relative_to(REPOSITORY)).write_text(document.read_text())
    for copy, document in zip(documents.rewrite(tmp_path, REPOSITORY / "results", PROTOCOL), documents_here, strict=True):
        assert copy.read_text() == document.read_text(), document


def test_averages_stand_side_by_side_beside_the_papers(tmp_path):
    rendered(tmp_path, "table4", lines_of(rows_of("table4", seeds=(0, 1, 2)), lambda name, seed: 0.7 if name == "RCLL" else 0.2 + seed / 10))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("<!-- averages: table4-digits-small nothing-digits-small -->\n<!-- end -->\n")
    documents.rewrite(tmp_path, tmp_path, PROTOCOL)
    shown = (tmp_path / "README.md").read_text()
    assert "| row | paper, 3D MNIST | digits, small scale | nothing-digits-small |\n" in shown
    assert "| RCLL | 84.1 | 71.0 ± 0.0 |  |\n" in shown and "| AUE, RCLL's slope at p = 0.5 |  | 31.0 ± 10.0 |  |\n" in shown
