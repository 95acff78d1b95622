"""What a time-series language model is worth beside others: guessing, words alone, exchanged series,
nearest neighbour, features, MiniRocket; and how often its answers are right, over seeds.

    python studies/tslm_study.py baselines            minutes
    python studies/tslm_study.py ours --seeds 1 2 3   an hour on two cores
    python studies/tslm_study.py control RUN          a run's answers, and under the two controls
    python studies/tslm_study.py captions RUN         the facts in a run's captions
    python studies/tslm_study.py forecasts RUN        a run's forecasts beside classical ones

Results go into tslm_study.json beside this file."""
import argparse
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sprout_lab.data.questions import load_questions
from sprout_lab.data.series import SeriesSet, exchange_series, z_score
from sprout_lab.decoding.answers import option_log_probs, write_answers
from sprout_lab.evaluation.series import crps, judge, longest_answer, mase, read_forecast
from sprout_lab.families import configure, load_model, make_trainer

RESULTS = Path(__file__).with_suffix(".json")
SETS = ("questions", "basic_motions", "ecg_beats")
LENGTH = 100


def resampled(values: np.ndarray, length: int = LENGTH) -> np.ndarray:
    "`values` z-scored and stretched to `length`."
    places = np.linspace(0, len(values) - 1, length)
    return np.interp(places, np.arange(len(values)), z_score(values)[0])


def by_choices(samples) -> dict:
    "Samples by their choices: each kind of question is a task of its own."
    kinds = defaultdict(list)
    for sample in samples: kinds[sample.labels].append(sample)
    return kinds


def tensor(samples) -> np.ndarray:
    "`(samples, channels, LENGTH)`."
    return np.array([[resampled(v) for v in s.time_series] for s in samples])


def dtw(a: np.ndarray, b: np.ndarray, band: int = 10) -> np.ndarray:
    "Squared warped distances of `a (channels, T)` to each of `b (n, channels, T)`, within a band."
    length = a.shape[1]
    cost = ((a[None, :, :, None] - b[:, :, None, :]) ** 2).sum(1)            # (n, T, T)
    best = np.full((len(b), length + 1, length + 1), np.inf)
    best[:, 0, 0] = 0
    for i in range(1, length + 1):
        for j in range(max(1, i - band), min(length, i + band) + 1):
            before = np.minimum(np.minimum(best[:, i - 1, j], best[:, i, j - 1]),
                                best[:, i - 1, j - 1])
            best[:, i, j] = cost[:, i - 1, j - 1] + before
    return best[:, length, length]


def nearest(train, labels, test, thin: int = 2, most: int = 300) -> list:
    "1-NN under DTW; series thinned to half, at most `most` training samples."
    train, test = train[:most, :, ::thin], test[:, :, ::thin]
    return [labels[int(np.argmin(dtw(row, train)))] for row in test]


def features(samples) -> np.ndarray:
    "Raw mean, std, extremes, slope, echoes and the strongest frequencies of each channel."
    table = []
    for sample in samples:
        row = []
        for values in sample.time_series:
            x, mean, std = z_score(values)
            r = np.corrcoef(np.arange(len(x)), x)[0, 1] if x.std() > 0 else 0.0
            spectrum = np.abs(np.fft.rfft(resampled(values)))[1:9] / len(x)
            thirds = [part.max() for part in np.array_split(x, 3)]
            echo = [float((x[k:] * x[:-k]).mean()) for k in (1, 2, 4, 8)]
            row += [mean, std, x.max(), x.min(), r, *thirds, *echo, *spectrum, len(x)]
        table.append(row)
    return np.nan_to_num(np.array(table))


def minirocket(x: np.ndarray, reference: np.ndarray, seed: int = 0) -> np.ndarray:
    """Shares of positive values under 84 kernels of nine weights (-1, three of them 2) at several
    dilations, with biases from quantiles of `reference` (Dempster et al., 2021)."""
    from itertools import combinations
    random, columns = np.random.default_rng(seed), []
    dilations = sorted({int(2 ** e) for e in np.linspace(0, np.log2((LENGTH - 1) / 8), 6)})
    for channel in range(x.shape[1]):
        for d in dilations:
            pad = 4 * d
            wide = [np.pad(t[:, channel], ((0, 0), (pad, pad))) for t in (x, reference)]
            shifts = [np.stack([w[:, k * d:k * d + LENGTH] for k in range(9)]) for w in wide]
            totals = [-s.sum(0) for s in shifts]
            for three in combinations(range(9), 3):
                out, seen = (t + 3 * s[list(three)].sum(0) for t, s in zip(totals, shifts))
                sample = seen[random.integers(len(seen))]
                for q in random.uniform(0.1, 0.9, 2):
                    columns.append((out > np.quantile(sample, q)).mean(1))
    return np.array(columns).T


def baselines(name: str) -> dict:
    "Accuracy of each on a set's test split, over all kinds of questions."
    sets = load_questions(name)
    train, test = (by_choices([*sets[a], *(sets["validation"] if a == "train" else [])])
                   for a in ("train", "test"))
    right, total = defaultdict(int), len(sets["test"])
    for choices, asked in test.items():
        known = train[choices]
        labels, expected = [s.label for s in known], [s.label for s in asked]
        x, y = tensor(known), tensor(asked)
        plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        rocket = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-3, 3, 7)))
        given = {"1-NN (DTW)": nearest(x, labels, y),
                 "features and logistic regression":
                     plain.fit(features(known), labels).predict(features(asked)),
                 "MiniRocket": rocket.fit(minirocket(x, x), labels).predict(minirocket(y, x))}
        for method, answers in given.items():
            right[method] += sum(a == b for a, b in zip(answers, expected))
    return {"majority": sets["test"].majority(),
            **{method: count / total for method, count in right.items()}}


def controlled(folder, name: str, most: int | None = None) -> dict:
    "A run's accuracy on test questions, with series exchanged, and with mean and std withheld."
    model, tokenizer = load_model(folder)
    test = SeriesSet(load_questions(name)["test"][:most])
    def accuracy(samples):
        texts = write_answers(model, tokenizer, list(samples), longest_answer(samples))
        return judge(list(samples), texts)["accuracy"]
    scores = {"accuracy": accuracy(test), "exchanged series": accuracy(exchange_series(test))}
    flat = [replace(s, time_series=[np.zeros_like(v) for v in s.time_series]) for s in test]
    scores["text only"] = accuracy(flat)
    model.config.statistics = False
    scores["without mean and std"] = accuracy(test)
    return scores


def ours(name: str, form: str, seed: int, folder: Path, **flags) -> dict:
    "Train and judge one."
    place = folder / f"{name}-{form}-{seed}"
    run = configure("tslm", {"dataset_name": name, "form": form, "seed": seed, "device": "cpu",
                             "output_dir": str(place), "resume_from": "auto",
                             "tensorboard": False, **flags})
    make_trainer(run).train()
    return controlled(place, name)


def captioned(folder) -> dict:
    "The facts in a run's captions of test series; as they are, and with the series exchanged."
    model, tokenizer = load_model(folder)
    test, rows = load_questions("m1_captions")["test"], {}
    for name, samples in (("as they are", test), ("exchanged series", exchange_series(test))):
        texts = write_answers(model, tokenizer, list(samples), longest_answer(samples))
        rows |= {f"{key}, {name}": value for key, value in judge(list(samples), texts).items()}
    facts = [sample.facts for sample in load_questions("m1_captions")["train"]]
    common = {key: Counter(f[key] for f in facts).most_common(1)[0][0] for key in facts[0]}
    rows["facts right, the commonest ones said"] = float(np.mean(
        [s.facts[key] == value for s in test for key, value in common.items()]))
    return rows


@dataclass
class Smoothing:
    """Exponential smoothing with a damped slope (Gardner and McKenzie, 1985): `alpha` = 1 without
    a slope is the naive forecast, the same as the seasonal one for yearly values."""
    alpha: float = 1.0
    beta: float = 0.0
    damping: float = 1.0
    slope: float = 0.0

    def run(self, values) -> tuple:
        "(errors of each next value, the level and the slope after the last one)."
        level, slope, errors = values[0], self.slope, []
        for value in values[1:]:
            slope *= self.damping
            error = value - level - slope
            errors.append(error)
            level, slope = level + slope + self.alpha * error, slope + self.beta * error
        return np.array(errors), level, slope

    def draw(self, past, horizon: int, draws: int, random) -> np.ndarray:
        "Continuations `(draws, horizon)` with errors as large as those so far."
        errors, level, slope = self.run(past)
        noise = random.normal(0, errors.std(), (draws, horizon))
        level, slope, rows = np.full(draws, level), np.full(draws, slope), []
        for step in range(horizon):
            slope = slope * self.damping
            rows.append(level + slope + noise[:, step])
            level = level + slope + self.alpha * noise[:, step]
            slope = slope + self.beta * noise[:, step]
        return np.stack(rows, 1)

    def bits(self, past, future, width: float) -> float:
        "Bits per value of `future`, in bins of `width`, each value after the true ones before."
        errors, _, _ = self.run(np.concatenate([past, future]))
        size = max(errors[:len(past) - 1].std(), 0.1 * width)
        cdf = np.vectorize(lambda x: 0.5 * (1 + math.erf(x / size / math.sqrt(2))))
        after = errors[len(past) - 1:]
        share = cdf(after + width / 2) - cdf(after - width / 2)
        return float(-np.log2(np.maximum(share, 1e-9)).mean())


def ets(past) -> Smoothing:
    "The smoothing with the smallest squared errors on `past`, of a grid (ETS(A, Ad, N))."
    first = float(np.diff(past).mean())
    grid = [Smoothing(a, b * a, d, slope) for a in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
            for b in (0.0, 0.1, 0.3, 0.5) for d in (0.8, 0.9, 1.0) for slope in (0.0, first)]
    return min(grid, key=lambda one: float((one.run(past)[0] ** 2).sum()))


def forecast_errors(past, future, draws) -> dict:
    "MASE of the median of `draws (draws, horizon)`, and CRPS in units of the naive error."
    scale = max(float(np.abs(np.diff(past)).mean()), 1e-12)
    return {"mase": mase(np.median(draws, 0), future, past), "crps": crps(draws, future) / scale}


def forecast_scores(folder, number: int = 20) -> dict:
    "A run's forecasts of test series, and those of classical methods, on the same values."
    model, tokenizer = load_model(folder)
    test, random = load_questions("forecasts")["test"], np.random.default_rng(0)
    found = defaultdict(list)
    for sample in test:
        past, future = np.array(sample.time_series[0], float), np.array(sample.facts["future"])
        width = 10.0 ** -sample.facts["decimals"] * sample.facts["std"]
        texts = write_answers(model, tokenizer, [sample] * number, longest_answer([sample]), 1.0)
        ours = np.array([read_forecast(text, sample) for text in texts])
        nats = -float(option_log_probs(model, tokenizer, sample, [sample.answer])[0])
        found["ours"].append({**forecast_errors(past, future, ours),
                              "bits per value": nats / math.log(2) / len(future)})
        drift = Smoothing(slope=float(np.diff(past).mean()))
        for name, method in (("seasonal naive", Smoothing()), ("drift", drift), ("ETS", ets(past))):
            draws = method.draw(past, len(future), 200, random)
            found[name].append({**forecast_errors(past, future, draws),
                                "bits per value": method.bits(past, future, width)})
    return {name: {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
            for name, rows in found.items()}


def keep(part: str, value: dict) -> None:
    "Put a part into the results."
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known[part] = {**known.get(part, {}), **value}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    print(part, json.dumps(value))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("baselines", "ours", "control", "captions", "forecasts"))
    parser.add_argument("run", nargs="?")
    parser.add_argument("--sets", nargs="+", default=SETS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--forms", nargs="+", default=["soft_prompt", "flamingo"])
    parser.add_argument("--folder", type=Path, default=Path("runs/tslm_study"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    flags = dict(pair.split("=", 1) for pair in given.set)
    label = f"ours, {Path(given.run).name}" if given.run else ""
    if given.what == "captions": keep("m1_captions", {label: captioned(given.run)})
    if given.what == "forecasts": keep("forecasts", forecast_scores(given.run))
    for name in given.sets if given.what in ("baselines", "ours", "control") else ():
        if given.what == "baselines": keep(name, baselines(name))
        elif given.what == "control": keep(name, {label: controlled(given.run, name)})
        else:
            for form in given.forms:
                for seed in given.seeds:
                    keep(name, {f"ours, {form}, seed {seed}":
                                ours(name, form, seed, given.folder, **flags)})
