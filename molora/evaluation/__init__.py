"""Score a model on every task's evaluation rows, before and after training.

| rows | metric | value |
|---|---|---|
| with `choices` | `accuracy` | share of rows whose right choice has the highest summed log-likelihood, end included |
| with `choices` | `accuracy_norm` | the same by log-likelihood a character of the choice |
| with a prompt | `exact_match` | share of greedy answers equal to the reference, outer white space aside |
| with a prompt | `token_f1` | mean F1 of the answers' and references' white-space tokens, counted as bags |
| all | `perplexity` | exp of the mean negative log-likelihood a token of the right answer, or of the text |

A higher perplexity is worse. It moves before the others do, as it sees how sure the model is and not only what it
would say: with few rows, look there first. `accuracy` and `accuracy_norm` correspond to `acc` and `acc_norm` of
lm-evaluation-harness, whose own tasks leave out the end.

Likelihoods come from `molora.likelihood`, answers from `generate`. Routing that reads a task is given each task's
position, routing that reads scores those of the row.
"""

from molora.evaluation.metrics import token_f1
from molora.evaluation.scores import HEADLINES, LOWER_IS_BETTER, Change, TaskScore, score_table, with_error
from molora.evaluation.tasks import score_tasks

__all__ = [
    "HEADLINES",
    "LOWER_IS_BETTER",
    "Change",
    "TaskScore",
    "score_table",
    "score_tasks",
    "token_f1",
    "with_error",
]
