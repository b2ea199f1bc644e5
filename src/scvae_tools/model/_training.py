"""Training of a model: stages on a split of the cells, the start of the mixture, the order of the components."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from scvae_tools._checks import check_choice, checked
from scvae_tools._interrupts import interrupts_held
from scvae_tools._messages import InterruptedTraining, warn
from scvae_tools._module.mixture_vaes import MixtureVAE
from scvae_tools._other_names import answers_other_names
from scvae_tools._threads import considerate_threads
from scvae_tools._train import null_model
from scvae_tools._train.checkpoint import Checkpointer, fingerprint, require_alike
from scvae_tools._train.mixture_start import start_from_labels, start_mixture
from scvae_tools._train.plan import NonFiniteError, Objective
from scvae_tools._train.principal_codes import PRINCIPAL_CODES
from scvae_tools._train.progress import START_OF_MIXTURE, Progress, is_shown
from scvae_tools._train.recorder import RateRecorder
from scvae_tools._train.run import REMEDY, Settings, Trained, run_stage
from scvae_tools._train.stages import Stage, default_max_epochs, default_patience, noise_edge, plan_stages
from scvae_tools._train.temperature import temperature_of
from scvae_tools._train.versions import Version, changed, copied, renumbered
from scvae_tools.model._trainer_options import (
    check_trainer_options,
    device_of_training,
    join_processes,
    whether_to_hold,
)
from scvae_tools.model._training_cells import TrainingCellsMixin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pandas as pd

    from scvae_tools._data.loader import CountDataset


#: Values of ``matmul_precision``.
PRECISIONS = (None, "highest", "high", "medium")


class TrainingMixin(TrainingCellsMixin):
    """Training of `SCVAE`."""

    @property
    def history(self) -> pd.DataFrame | None:
        """A row per epoch of all trainings so far; None before the first.

        Columns: ``epoch``, ``stage`` and ``kl_weight`` (as it was at the start of the epoch); for each of
        ``train`` and ``validation`` (``elbo_train``, ...) ``elbo``, ``log_likelihood``, ``kl_z`` and ``kl_y``, in nats
        per cell and not weighted. With ``record_rates=True`` also, of at most 512 training cells, before zero inflation
        and at the posterior means: ``rate_at_zeros``, the mean over cells of Σ λ over the genes with x = 0, in counts
        per cell, and ``max_rate``, the largest λ, in counts; NaN in epochs that were trained without.
        """
        return self._state.history

    @property
    def null_log_likelihood(self) -> dict[str, float] | None:
        """Log-likelihood of the cells without latent variables, in nats per cell; None after less than 120 steps.

        Keys ``"train"`` and, where cells are held out, ``"validation"``. It is of a model with the same likelihood,
        size factors and covariates, fitted to the same training cells, whose other parameters are the same for all
        cells. The ELBO of held-out cells less this number is what the latent space explains. Where it is not positive,
        the training warns: the latent codes hold noise.
        """
        return self._state.null_log_likelihood

    @answers_other_names
    @checked()
    def train(
        self,
        max_epochs: int | None = None,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        n_warm_up_epochs: int | None = None,
        kl_weight_start: float | None = None,
        pca_start: bool = False,
        kl_weight: float = 1.0,
        free_nats_y: float = 0.0,
        free_nats_z: float = 0.0,
        n_samples: int = 1,
        n_importance_samples: int = 1,
        batch_size: int = 128,
        train_size: float = 0.9,
        validation_indices: Sequence[int] | None = None,
        early_stopping: bool = True,
        patience: int | None = None,
        gradient_clip: float | None = 100.0,
        accelerator: str = "auto",
        devices: int | str = "auto",
        hold_on_device: bool | None = None,
        matmul_precision: Literal["highest", "high", "medium"] | None = None,
        progress: bool | None = None,
        record_rates: bool = False,
        checkpoint: str | Path | None = None,
        random_state: int = 0,
        **trainer_options: Any,
    ) -> None:
        """Train by stages: KL warm-up, VAE, and for a mixture the full bound from the VAE's latent space.

        Parameters
        ----------
        max_epochs
            Of all stages together; None for about 4,000 steps of 128 cells, but at least 20 and at most 400 epochs. An
            epoch ends when all training cells were seen, or 400,000 of them, drawn anew each time.
        lr, weight_decay
            Of Adam; dispersions that cells share learn at ten times the rate. The decay acts on all that is trained,
            biases and log r included: it pulls λ over the size factor, and r, towards 1.
        n_warm_up_epochs
            Epochs at the beginning over which the weight of the KL terms goes from ``kl_weight_start`` to
            ``kl_weight``; None for a quarter of the VAE's.
        kl_weight_start
            Weight of both KL terms at the beginning, relative to ``kl_weight``. None for (1 + √(n_genes / n_cells))²,
            with the number of training cells, above which no direction of pure noise is worth its KL: so dimensions
            that hold what cells differ in are learnt first, and noise is not (docs/model.md). 0 for the usual warm-up
            from below.
        pca_start
            Whether the latent means are drawn to principal components of the counts in the warm-up, with a weight that
            falls to 0: to those of Pearson residuals, without what covariates explain, that are above the noise. The
            latent space then holds smaller differences between cells, but the bound is lower (docs/model.md).
        kl_weight
            Weight of both KL terms after that. The bounds in `history` are never weighted.
        free_nats_y
            KL(q(y|x) ‖ p(y)) that costs nothing, as a share of the entropy H[p(y)]: where its mean over the cells of a
            step is less, it has no gradient.
        free_nats_z
            The same for the KL of z, in nats per cell (after Kingma et al. 2016, arXiv:1606.04934).
        n_samples
            Draws of z per cell and component whose bounds are averaged.
        n_importance_samples
            Draws of z per cell and component for the importance-weighted bound (Burda et al. 2016, arXiv:1509.00519),
            which is then trained in place of the ELBO; y stays summed out. The ELBO in `history` is that of the same
            draws. 1 for the ELBO.
        batch_size
            Cells a step on each device; 128 gave the best bound for the time (docs/performance.md).
        train_size
            Share of the cells that are trained on; the others, or 44,444 of them, tell when to stop and which weights
            to keep.
        validation_indices
            Positions of the cells to hold out, or one boolean per cell, in place of a random draw. Where labels train
            the components, some cells of each label must be left to train on; a random draw sees to that itself.
        early_stopping, patience
            Whether, and after how many epochs without a better validation ELBO, a stage ends. None for 20
            epochs; the VAE waits for 640 steps if that is more epochs, since those of few cells have few steps.
        gradient_clip
            Largest norm of the gradient; None for any.
        accelerator, devices
            Of Lightning. ``"auto"`` is one device; for more, ``strategy="ddp"`` is meant, in which each has a process
            that runs the whole script, and comes out with the same model. Each process trains on its own share of the
            cells, and takes ``batch_size`` of them a step: two devices take twice as many cells a step, and half as
            many steps. With ``num_nodes``, the devices of one machine of several (docs/devices.md).
        hold_on_device
            Whether the counts are copied to the device that trains, where all batches are then formed, and on a CUDA
            device each step is recorded once and repeated. None to do so on CUDA devices alone. Where they would take
            more than half of the free memory of the device, windows of cells are copied there one after the other, and
            batches are drawn within a window. The result is the same but for rounding, where all counts have room and
            nothing is dropped out; dropout draws other random numbers. It cannot be combined with
            ``trainer_options`` that change how a step is taken; None then leaves the counts where they are. Callbacks
            see groups of steps in place of batches, and a learning rate that they change has no effect.
        matmul_precision
            Precision of torch's matrix products during training (``torch.set_float32_matmul_precision``): ``"medium"``
            takes bfloat16 where the CPU has it, ``"high"`` TF32 on a GPU; see docs/performance.md. None leaves
            the setting as it is.
        progress
            Whether to show a bar with epoch, ELBO and time left; None to do so unless ``scanpy.settings.verbosity`` is
            0 or ``scvi.settings.verbosity`` above INFO.
        record_rates
            Whether to put λ of at most 512 training cells into the `history` at the end of each epoch, for
            `scvae_tools.pl.stability`: ``rate_at_zeros``, the mean over cells of the sum of λ over the genes of which
            the cell has no count, and ``max_rate``, the largest λ, both in counts. The training is the same.
        checkpoint
            Directory of a file from which a training that was killed continues; None for none. See below.
        random_state
            Seed of split, order of cells and Monte Carlo samples.
        **trainer_options
            Further arguments of ``lightning.pytorch.Trainer``, such as ``logger`` and ``callbacks``, which see one
            training: epochs and steps are counted over all stages. ``enable_progress_bar=False`` is the same as
            ``progress=False``.

        Raises
        ------
        NonFiniteError
            If a term of the bound, a weight, λ or the mixture became NaN or infinite, also at a tenth of the learning
            rate.
        ValueError
            If an argument does not fit, or ``checkpoint`` holds a training of other data, another model or other
            arguments (it says which), or one that is running.

        Notes
        -----
        Ctrl-C ends the training; the best weights so far are kept, and a warning says which. During the start of the
        mixture it ends the training after the start, and at once where it is pressed again. Any other exception
        leaves the model as it was after the last stage that had ended, or else as it was before.

        All weights that a training leaves, not the best alone, are in `versions`.

        With ``checkpoint``, all that is needed to continue is written at the end of each epoch, to a file that is whole
        whenever the process ends. The same model, built anew on the same data, with the same arguments of
        ``train`` and the same directory, continues after the last epoch that had ended, and comes out as it would have
        without a break, to the last bit where CPU, number of threads and versions of the packages are the same.
        After the last epoch the file holds the result: the same call then loads it and trains nothing. The file is
        about six times as large as the weights, and costs 26 ms an epoch for 2,000 genes and 128 hidden units.
        """
        arguments = dict(locals())
        arguments["trainer_options"] = of_trainer = check_trainer_options(trainer_options, self.train)
        self._require_data_to_train()
        objective = Objective(kl_weight, free_nats_y, free_nats_z, n_samples, n_importance_samples)
        objective.check(self.module)
        check_choice("matmul_precision", matmul_precision, PRECISIONS)
        arguments["max_epochs"] = default_max_epochs(self.adata.n_obs) if max_epochs is None else max_epochs
        stages = self._stages(arguments["max_epochs"], n_warm_up_epochs)
        processes = join_processes(accelerator, devices, trainer_options)
        bar = Progress(stages, enable=is_shown(progress, of_trainer.pop("enable_progress_bar", None)))
        *where, device = device_of_training(accelerator, devices, processes)
        settings = Settings(lr, weight_decay, objective, gradient_clip, early_stopping, *where, matmul_precision, bar)
        settings.trainer_options, settings.processes = of_trainer, processes
        hold = whether_to_hold(hold_on_device, of_trainer, processes)
        with (
            self._context_of_training(random_state, (train_size, validation_indices), processes) as dataset,
            self._holding_cells(self._with_codes(dataset, stages, pca_start, random_state), device, hold),
        ):
            settings.cells, loaders = self._held, self._loaders(batch_size, dataset, pin_memory=device.type == "cuda")
            stages = self._with_defaults(stages, dataset, kl_weight_start, patience, len(loaders[0]))
            settings.probe = RateRecorder(dataset, self.train_indices, random_state)
            settings.recorder = settings.probe if record_rates else None
            self.to_device(device)
            settings.checkpoint = self._checkpointer(checkpoint, dataset, arguments)
            try:
                self._run(stages, loaders, settings, random_state)
                self._compare_with_null(dataset, len(loaders[0]), settings, random_state)
            finally:
                settings.close()
            self.to_device(device)

    def _stages(self, max_epochs: int, n_warm_up_epochs: int | None) -> list[Stage]:
        return plan_stages(
            max_epochs,
            mixture=isinstance(self.module, MixtureVAE),
            resumes_vae=self._state.is_trained,
            resumes_mixture=self.is_mixture,
            n_warm_up_epochs=n_warm_up_epochs,
        )

    def _with_defaults(
        self,
        stages: list[Stage],
        dataset: CountDataset,
        kl_weight_start: float | None,
        patience: int | None,
        n_steps: int,
    ) -> list[Stage]:
        """Stages with what None derives from the training cells and the number of steps of an epoch."""
        has_codes = PRINCIPAL_CODES in dataset.columns
        if kl_weight_start is None:
            kl_weight_start = noise_edge(len(self.train_indices), self.adata.n_vars)

        def with_defaults(stage: Stage) -> Stage:
            waits = default_patience(n_steps, is_mixture=stage.is_mixture) if patience is None else patience
            codes = {"has_codes": has_codes and stage.warms_up}
            return dataclasses.replace(stage, kl_weight_start=kl_weight_start, patience=waits, **codes)

        return list(map(with_defaults, stages))

    def _checkpointer(
        self, directory: str | Path | None, dataset: CountDataset, arguments: dict[str, Any]
    ) -> Checkpointer | None:
        """Keep a file of this training in a directory, if one is given, and take up that which is there."""
        processes = self._processes
        if directory is None and not processes.are_several:
            return None
        identity = fingerprint(
            dataset,
            self.module,
            self._state,
            registry=self.registry,
            var_names=self.var_names,
            held_out=self.validation_indices,
            of_model=self.init_params_["non_kwargs"],
            of_training=arguments,
            n_processes=processes.number,
        )
        require_alike(processes.gathered(identity))
        return None if directory is None else Checkpointer(directory, identity, dataset, processes)

    @contextlib.contextmanager
    def _former_weights_on_error(self) -> Iterator[None]:
        """Put the weights back where an exception ends a stage."""
        before = copied(self.module)
        try:
            yield
        except BaseException:
            self.module.load_state_dict(before)
            raise

    def _run(self, stages: list[Stage], loaders: tuple, settings: Settings, random_state: int) -> None:
        """Run the stages; after an interruption set a mixture all the same, so that every result exists."""
        checkpoint, state = settings.checkpoint, self._state
        state.is_interrupted = False
        if checkpoint is not None and checkpoint.is_finished:
            checkpoint.restore_result(self.module, state)
            self._note_n_components()
            return
        if self._processes.is_first:
            settings.progress.start()
        starts_mixture = isinstance(self.module, MixtureVAE) and not self.is_mixture
        first = 0 if checkpoint is None else self._resume(stages, settings)
        n_before = state.n_epochs
        with interrupts_held() as held:
            for index, stage in enumerate(stages[first:], first):
                starts_here = stage.is_mixture and not self.is_mixture
                if starts_here:
                    settings.progress.say(START_OF_MIXTURE)
                    self._start_mixture(random_state)
                if self._processes.any(held.take()):
                    if state.n_epochs == n_before:  # nothing would be lost
                        raise KeyboardInterrupt
                    if not state.is_interrupted:
                        self._report_interruption(stage, 0, checkpoint)
                        state.is_interrupted = True
                if not state.is_interrupted:
                    versions = self._run_stage(index, stage, loaders, settings)
                elif starts_here:
                    versions = {"end": Version(state.n_epochs, np.nan, copied(self.module))}
        state.versions, state.version = versions, "best" if "best" in versions else "end"
        if starts_mixture and self.is_mixture:
            settings.progress.say("order of the components")
            self._sort_components()
        if self.is_mixture:
            settings.progress.say("calibration")
            self._calibrate(random_state)
        if checkpoint is not None and not state.is_interrupted:
            checkpoint.finish(self.module, state)

    def _run_stage(self, index: int, stage: Stage, loaders: tuple, settings: Settings) -> dict[str, Version]:
        """Run a stage and note its epochs; return the versions of the weights that it leaves."""
        checkpoint, n_before = settings.checkpoint, self._state.n_epochs
        if checkpoint is not None:
            checkpoint.begin_stage(index, self.module, self._state)
        n_cells_of_step = len(self.train_indices) // max(1, len(loaders[0]))
        with considerate_threads(n_cells_of_step * self.adata.n_vars), self._former_weights_on_error():
            found = run_stage(self.module, stage, loaders, settings, first_epoch=n_before)
            rows, interrupted, versions = self._as_in_first(found)
            if interrupted and n_before + len(rows) == 0:
                raise KeyboardInterrupt
        self._state.add_epochs(rows)
        if interrupted:
            self._report_interruption(stage, len(rows), checkpoint)
        self._state.is_trained, self._state.is_interrupted = True, interrupted
        self._state.forget_versions()
        return versions

    def _as_in_first(self, trained: Trained) -> Trained:
        """Result of a stage as the first of several processes has it, the weights in the module too.

        They are the same, unless processors of different kinds have rounded differently.
        """
        if self._processes.are_several:
            trained, weights = self._processes.of_first(lambda: (trained, copied(self.module)))
            self.module.load_state_dict(weights)
        return trained

    def _compare_with_null(self, dataset: CountDataset, n_steps: int, settings: Settings, random_state: int) -> None:
        """Note the log-likelihood without latent variables, and say how far the ELBO of held-out cells is above it.

        Not after fewer steps than it takes: such a training is a trial. ``n_steps`` is the number in an epoch.
        """
        state = self._state
        state.null_log_likelihood = None  # that of an earlier split
        if state.is_interrupted or state.n_epochs * n_steps < null_model.N_STEPS:
            return
        settings.progress.say(null_model.NAME)
        with considerate_threads(null_model.N_CELLS * self.adata.n_vars):
            state.null_log_likelihood = self._processes.of_first(
                lambda: null_model.null_log_likelihoods(self.module, dataset, self.evaluated_cells(), random_state)
            )
        elbo = state.versions[state.version].elbo
        if np.isfinite(elbo) and "validation" in state.null_log_likelihood:
            null_model.report(elbo, state.null_log_likelihood["validation"])

    def _resume(self, stages: list[Stage], settings: Settings) -> int:
        """Go to the beginning of the stage in which the checkpoint was written; return its number."""
        first = settings.checkpoint.resume(self.module, self._state)
        self._note_n_components()
        if first > 0:  # the weights are those of a finished stage, and no version of an earlier training
            self._state.forget_versions()
        n_done = sum(stage.max_epochs for stage in stages[:first]) + settings.checkpoint.n_epochs_done()
        settings.progress.skip(n_done)
        return first

    def _note_n_components(self) -> None:
        """Let the arguments of the model say how many components `load` needs to build the same module."""
        self.init_params_["non_kwargs"]["n_components"] = self._state.n_components

    def _report_interruption(self, stage: Stage, n_epochs: int, checkpoint: Checkpointer | None) -> None:
        warn(
            f"Training was interrupted in stage {stage.name!r} after {n_epochs} of its at most {stage.max_epochs} "
            "epochs. Kept: the weights with the best validation ELBO of that stage, or else the last ones"
            + ("." if stage.is_mixture else "; the mixture, if any, is fitted to this latent space without training.")
            + ("" if checkpoint is None else f" {checkpoint.how_to_go_on()}"),
            InterruptedTraining,
        )

    def _start_mixture(self, random_state: int) -> None:
        """Set the mixture from the latent means of the training cells, and from their labels where these are known."""
        self._state.is_trained = True
        cells = self._cells_to_start_from()
        mean, variance = self._latent_of(cells)
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            error = NonFiniteError("q(z|x) of a training cell", "vae", self._state.n_epochs)
            error.args = (f"{error}. {REMEDY}",)
            raise error
        options = {"random_state": random_state, "device": self.module.device}
        found, processes = None, self._processes
        if self.is_supervised:
            label = self._components_of_labels()[cells]
            start = processes.of_first(
                lambda: start_from_labels(mean, label, len(self.labels), self.n_components, **options)
            )
        else:
            wanted = self.n_components or self._state.n_components  # a number, a range, or None
            found = processes.of_first(lambda: start_mixture(mean, wanted, **options))
            start = found.mixture
        if self.n_components is None:
            self._state.component_curve = None if found is None else found.curve
            self.module.build_mixture(len(start.weights))
        self._state.n_components = self.n_components
        self._note_n_components()
        if not self.is_supervised:
            order = np.argsort(-start.weights, kind="stable")  # that of `weights`, if they are given
            start = start._replace(weights=start.weights[order], means=start.means[order])
            self._state.valley_p_values = found.valley_p_values[np.ix_(order, order)]
        if self._takes_weights_of_labels:
            start = start._replace(weights=self._weights_of_labels(start.weights))
        as_tensor = functools.partial(torch.as_tensor, dtype=torch.float32, device=self.module.device)
        self.module.set_mixture(*map(as_tensor, start), as_tensor(variance.mean(0)))

    def _latent_of(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and variances of q(z|x) of some cells, (n, n_latent) each."""

        def of_part(cells: np.ndarray) -> np.ndarray:
            return np.stack(self.get_latent_representation(indices=cells, return_dist=True), axis=1)

        mean, variance = self._processes.by_parts(of_part, cells).swapaxes(0, 1)
        return mean, variance

    def _weights_of_labels(self, start: np.ndarray) -> np.ndarray:
        """Shares of the labels among the labelled training cells, (k,).

        Components beyond the labels keep the share with which they start. Where labels do not train the components, the
        largest share goes to the largest component.
        """
        label = self._components_of_labels()[self.train_indices]
        shares = np.bincount(label[label >= 0], minlength=len(self.labels)) / np.sum(label >= 0)
        if not self.is_supervised:
            return np.sort(shares)[::-1].copy()
        others = start[len(shares) :]
        return np.r_[shares * (1 - others.sum()), others]

    def _sort_components(self) -> None:
        """Number the components by decreasing size, here and in all results; those of labels stay in place."""
        most_probable = self._processes.by_parts(
            lambda cells: self._probabilities(indices=cells).numpy().argmax(1),
            np.arange(self.adata.n_obs),
        )
        sizes = np.bincount(most_probable, minlength=self.n_components)
        n_fixed = len(self.labels) if self.is_supervised else 0
        order = np.r_[:n_fixed, n_fixed + np.argsort(-sizes[n_fixed:], kind="stable")]
        if self.valley_p_values_ is not None:
            self._state.valley_p_values = self.valley_p_values_[np.ix_(order, order)]
        order = torch.as_tensor(order, device=self.module.device)
        self._state.versions = renumbered(self.module, self._state.versions, order)
        self.module.permute_components(order)

    def _calibrate(self, random_state: int) -> None:
        """Set the temperature of the probabilities by the held-out cells, in the weights in use and in all versions."""

        def set_temperature() -> None:
            self.module.set_temperature(self._processes.of_first(temperature))

        def temperature() -> float:
            if len(self._watched()) == 0:
                return 1.0
            raw = self._probabilities(indices=self._watched()).double()
            log_probs = raw.clamp(min=torch.finfo(torch.float32).tiny).log().numpy()
            return temperature_of(log_probs, random_state=random_state)

        self._state.versions = changed(self.module, self._state.versions, set_temperature)
        self.module.load_state_dict(self._state.versions[self._state.version].state)
