"""The information bottleneck of diffusion (paper, Eq. 5 and Figure 2b): what each step may say, under each schedule."""

import numpy as np
from matplotlib.figure import Figure

from ldm.figures.style import COLOURS, COLUMN
from ldm.figures.subject import NotShown, Subject
from ldm.models.diffusion.schedule import SCHEDULES, expected_kl, make_beta_schedule

# Start and end of β in the first release's configurations, and in ours.
RELEASE = (0.0015, 0.0155)


def draw(subject: Subject) -> Figure:
    """A line per schedule of the paper's Table 4, and, where it is none of these, the model's own.

    The divergence's mean over images of unit variance, in closed form: see `expected_kl`.
    """
    if subject.first_stage_only or subject.one_pass:
        raise NotShown("without diffusion there is no noise schedule")
    own = subject.model.betas.double().cpu().numpy()
    figure = Figure(figsize=(COLUMN, 2.3), layout="constrained")
    axes, steps, known = figure.subplots(), len(own), False
    for colour, schedule in zip(COLOURS, SCHEDULES, strict=False):
        betas = make_beta_schedule(schedule, steps, *RELEASE)
        mine = np.allclose(betas, own, rtol=1e-4, atol=1e-7)
        known |= mine
        name = f"{schedule.replace('_', '-')} (this model's)" if mine else schedule.replace("_", "-")
        axes.plot(np.arange(2, steps + 1), expected_kl(betas)[1:], color=colour, label=name, lw=1.8 if mine else 1.1)
    if not known:
        axes.plot(np.arange(2, steps + 1), expected_kl(own)[1:], "--", color="black", label="this model's")
    axes.set(xlabel="t", ylabel="KL per dimension (nats)", xlim=(0, steps), ylim=(0, None))
    axes.set_title("KL(q(xₜ₋₁ | xₜ, x₀) ‖ N(0, I))", parse_math=False)
    axes.legend()
    return figure
