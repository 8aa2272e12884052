"""The study of fine-tuning: its rows are what they say, and its table compares seed by seed."""

from diversedit_jax.config import copied
from diversedit_jax.configs import digits
from tools.studies.finetuning import PLAIN, ROWS, table


def test_the_rows_differ_by_the_parts_alone():
    begin = digits.get_config()
    begin.model.skip, begin.losses = "none", {}
    found = {}
    for name, changes in ROWS.items():
        if "diversity" not in name and "both" not in name:
            found[name] = copied(begin)
            for change in changes:
                change(found[name])
    assert found[PLAIN].optim.learning_rate == begin.optim.learning_rate / 10
    assert found["+ long residuals"].groups.new.learning_rate == begin.optim.learning_rate
    assert found["+ long residuals"].model.skip_init == "identity"


def test_the_table_compares_seed_by_seed():
    rows = dict.fromkeys(("before", *ROWS), 1.0)

    def scores(distance):
        return {"frechet": distance, "accuracy": 99.0, "similarity": 0.5}

    results = {
        str(seed): {row: scores(scale * (2.0 if row == "+ both" else 1.0)) for row in rows}
        for seed, scale in enumerate((1.0, 3.0, 5.0))
    }
    lines = table(results).splitlines()
    assert lines[3] == f"| {PLAIN} | 3.000 ± 2.000 | 99.0 ± 0.0 | 0.500 ± 0.000 | 1 |"
    assert lines[6] == "| + both | 6.000 ± 4.000 | 99.0 ± 0.0 | 0.500 ± 0.000 | 2.000 [2.000, 2.000] |"
