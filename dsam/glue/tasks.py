"""The table of tasks: labels, metrics, columns, splits and official sizes of GLUE and of the built-in tasks."""

from dataclasses import dataclass, field

from ..errors import UserError, did_you_mean

FILES_AND_HUB = ("local", "hub")


@dataclass(frozen=True)
class Task:
    """One task, as `TASKS[name]` holds it.

    Labels are numbered as in the Hugging Face data set `nyu-mll/glue`; a regression has none.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    sources: tuple[str, ...] = FILES_AND_HUB
    folder: str = ""
    """Of the official files, below the root of GLUE."""
    columns: tuple[str, ...] = ("sentence1", "sentence2")
    """Of the text in the official files: one name, or two for a pair."""
    label_column: str = "label"
    file_labels: tuple[str, ...] = ()
    """How the official files write the labels, in their order."""
    hub_columns: tuple[str, ...] = ("sentence1", "sentence2")
    rows: dict[str, int] = field(default_factory=dict, hash=False)
    """Official number of rows of each split."""
    score_range: tuple[float, float] = (0.0, 5.0)
    """Of a regression's labels."""
    train_splits: tuple[str, ...] = ("train",)
    evaluation_splits: tuple[str, ...] = ("dev",)
    test_splits: tuple[str, ...] = ("test",)

    @property
    def regression(self) -> bool:
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head: one per label, 1 for a regression."""
        return len(self.labels) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits, each once (those of AX serve for evaluation and test alike)."""
        return tuple(dict.fromkeys(self.train_splits + self.evaluation_splits + self.test_splits))


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        UserError: there is none; the message gives the nearest name.
    """
    if name not in TASKS:
        raise UserError(f"unknown task '{name}': {did_you_mean(name, TASKS)}")
    return TASKS[name]


def _rows(train: int, dev: int, test: int) -> dict[str, int]:
    return {"train": train, "dev": dev, "test": test}


NLI = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")

TASKS = {
    task.name: task
    for task in (
        Task(
            name="cola",
            title="CoLA: linguistic acceptability",
            labels=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            folder="CoLA",
            columns=("sentence",),
            file_labels=("0", "1"),
            hub_columns=("sentence",),
            rows=_rows(8551, 1043, 1063),
        ),
        Task(
            name="sst2",
            title="SST-2: sentiment of film reviews",
            labels=("negative", "positive"),
            metrics=("accuracy",),
            folder="SST-2",
            columns=("sentence",),
            file_labels=("0", "1"),
            hub_columns=("sentence",),
            rows=_rows(67349, 872, 1821),
        ),
        Task(
            name="mrpc",
            title="MRPC: paraphrases in news",
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            folder="MRPC",
            columns=("#1 String", "#2 String"),
            label_column="Quality",
            file_labels=("0", "1"),
            rows=_rows(3668, 408, 1725),
        ),
        Task(
            name="stsb",
            title="STS-B: similarity of sentences, 0 to 5",
            labels=(),
            metrics=("pearson", "spearman"),
            folder="STS-B",
            label_column="score",
            rows=_rows(5749, 1500, 1379),
        ),
        Task(
            name="qqp",
            title="QQP: duplicate questions",
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            folder="QQP",
            columns=("question1", "question2"),
            label_column="is_duplicate",
            file_labels=("0", "1"),
            hub_columns=("question1", "question2"),
            rows=_rows(363846, 40430, 390965),
        ),
        Task(
            name="mnli",
            title="MNLI: inference in matched and mismatched genres",
            labels=NLI,
            metrics=("accuracy",),
            folder="MNLI",
            label_column="gold_label",
            file_labels=NLI,
            hub_columns=("premise", "hypothesis"),
            rows={
                "train": 392702,
                "dev_matched": 9815,
                "dev_mismatched": 9832,
                "test_matched": 9796,
                "test_mismatched": 9847,
            },
            evaluation_splits=("dev_matched", "dev_mismatched"),
            test_splits=("test_matched", "test_mismatched"),
        ),
        Task(
            name="qnli",
            title="QNLI: does the sentence answer the question",
            labels=ENTAILMENT,
            metrics=("accuracy",),
            folder="QNLI",
            columns=("question", "sentence"),
            file_labels=ENTAILMENT,
            hub_columns=("question", "sentence"),
            rows=_rows(104743, 5463, 5463),
        ),
        Task(
            name="rte",
            title="RTE: recognizing textual entailment",
            labels=ENTAILMENT,
            metrics=("accuracy",),
            folder="RTE",
            file_labels=ENTAILMENT,
            rows=_rows(2490, 277, 3000),
        ),
        Task(
            name="wnli",
            title="WNLI: Winograd schemas as inference",
            labels=("not_entailment", "entailment"),
            metrics=("accuracy",),
            folder="WNLI",
            file_labels=("0", "1"),
            rows=_rows(635, 71, 146),
        ),
        Task(
            name="ax",
            title="AX: diagnostic set, for a model trained on MNLI",
            labels=NLI,
            metrics=("matthews_correlation",),
            folder="diagnostic",
            file_labels=NLI,
            hub_columns=("premise", "hypothesis"),
            rows={"test": 1104},
            train_splits=(),
            evaluation_splits=("test",),
        ),
        Task(
            name="agreement",
            title="agreement (built in): does the verb agree with its subject",
            labels=("unacceptable", "acceptable"),
            metrics=("matthews_correlation",),
            sources=("builtin",),
            columns=("sentence",),
            test_splits=(),
        ),
        Task(
            name="entailment",
            title="entailment (built in): does the second sentence follow from the first",
            labels=ENTAILMENT,
            metrics=("accuracy",),
            sources=("builtin",),
            test_splits=(),
        ),
        Task(
            name="similarity",
            title="similarity (built in): how much two sentences share, 0 to 5",
            labels=(),
            metrics=("pearson", "spearman"),
            sources=("builtin",),
            test_splits=(),
        ),
    )
}
