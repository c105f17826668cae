"""Which of the network's errors count: those that the rest of sampling lets through to the finished image."""

from typing import Any

import torch

from .checks import check_fractions, check_positive, check_shares
from .schedule import NoiseSchedule
from .spectrum import Spectrum, component_powers, for_each_timestep, relative_gains


class WienerFilter:
    """l = mean_i v_i |e_i|^2, v_i = (1 - f) g_i / <g> + f, g_i = K_i^n s_i^(2r - 2): squared errors of eps behind the
    data's Wiener filter.

    e_i are the components of the error (spatial frequencies, and principal axes of the channels), s_i^2 the variances
    of the data's, and K_i = s_i^2 / (s_i^2 + sigma_t^2) is the gain of the best linear denoiser of x_t.

    By the end of ancestral sampling of Gaussian data (the reverse SDE), an error in eps at component i moves the image
    by 2 sigma K_i per unit of log sigma: what is put into a component that x_t has decided stays, the rest is replaced
    on the way down. So within a timestep an error's square counts K_i^2. By the end of the probability flow ODE (DDIM
    without noise), which moves the image by sigma e_i and lets the part sqrt(K_i) of that stay, it counts K_i: n is 2
    or 1. In plain mean squares all count the same; at high noise most of them are errors in copying noise from x_t, at
    frequencies at which nothing is decided yet.

    With r = 1 it counts by the square of what it moves: strong components count most, and faint ones hardly at all
    before they are decided. Relative to the variance s_i^2 of what is there, r = 0, the faintest would count most. With
    r = 1/2, relative to the amplitude, g_i = s_i / (s_i^2 + sigma_t^2) at n = 1 is largest where s_i = sigma_t, at the
    components that are being decided.

    What a timestep counts against another is left to the weighting c_t: <g> = sum g K / sum K is the mean over the loss
    of the best linear denoiser, E |e_i|^2 = K_i, which so keeps the value that it has in plain mean squares.
    That is a choice: with the two derived together, the few components that are decided at high noise take nearly all
    of the weight, which trains far worse.
    The minimiser is E[eps | x_t], as ever, since all v_i are positive.

    Its nearest relative is k-diffusion's loss, the filter `frequency`: fixed counts by frequency, the same at every t.

    Args:
        schedule: the `NoiseSchedule`.
        spectrum: the data's `Spectrum`.
        plain_fraction: f in (0, 1], of the plain mean square: images are not Gaussian, and no error may grow unseen. By
            default 0.1 + 0.9 F, with F the `flatness` of the spectrum: where components differ little in strength,
            none is so faint that its errors would not be seen.
        exponent: n, positive: 2 for ancestral sampling, 1 for the ODE.
        power: r in [0, 1], as in the weighting `spectral`: 1 for squares of what an error moves, 1/2 for these relative
            to the amplitude s_i.
        device: of the errors.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        spectrum: Spectrum,
        plain_fraction: float | None = None,
        exponent: float = 2.0,
        power: float = 1.0,
        device: torch.device | str = "cpu",
    ) -> None:
        if plain_fraction is None:
            plain_fraction = 0.1 + 0.9 * spectrum.flatness
        check_shares(plain_fraction=plain_fraction)
        check_positive(exponent=exponent)
        check_fractions(power=power)
        self._schedule, self._device, self.exponent, self.power = schedule, device, exponent, power
        self._make_tables(spectrum, plain_fraction)

    def _make_tables(self, spectrum, plain_fraction):
        self.spectrum, self.plain_fraction = spectrum, plain_fraction
        variances, abar, n = spectrum.variances, self._schedule.alphas_cumprod, self.exponent
        relative = variances.clamp_min(1e-12) ** (self.power - 1)

        def normalizer(gains):  # 1 / <g>
            return gains.sum(1) / (gains.pow(n + 1) * relative.flatten()).sum(1)

        normalizers = for_each_timestep(normalizer, variances, self._schedule)
        W = variances.shape[-1]
        half = torch.arange(W // 2 + 1)  # the columns of frequencies that decide the others
        opposites = 1.0 + ((half > 0) & (2 * half < W))  # 2 where another column holds the opposite frequencies
        by_timestep = torch.stack([abar, 1 - abar, (1 - plain_fraction) * normalizers], 1)
        components = (variances[..., half], relative[..., half], opposites / variances.numel())
        self._axes, self._by_timestep, self._variances, self._relative, self._opposites = (
            table.float().to(self._device)  # in this order: the device may have no float64
            for table in (spectrum.axes, by_timestep, *components)
        )

    def __call__(self, errors: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """[B] the losses of `errors` [B, C, H, W] in eps at `timesteps` [B]; of other spatial axes where the data are.

        Raises:
            ValueError: the errors are not of the shape of the images that the spectrum is of.
        """
        image_shape = self.spectrum.variances.shape
        if errors.shape[1:] != image_shape:
            raise ValueError(
                f"errors are {list(errors.shape[1:])}, but the spectrum is of images of {list(image_shape)}"
            )
        with torch.autocast(errors.device.type, enabled=False):
            powers = component_powers(errors.float(), self._axes, torch.fft.rfftn)
        signal, noise, scale = self._by_timestep[timesteps].view(-1, 3, *(errors.ndim - 1) * [1]).unbind(1)
        moved = relative_gains(self._variances, signal, noise).pow(self.exponent) * self._relative
        counts = scale * moved + self.plain_fraction
        return (counts * self._opposites * powers).flatten(1).sum(1)

    def state_dict(self) -> dict[str, Any]:
        """What the filter is made from, beside the noise schedule: axes [C, C], variances [C, H, W], exponent, power
        and plain_fraction."""
        own = {name: getattr(self, name) for name in ("exponent", "power", "plain_fraction")}
        return {**self.spectrum._asdict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Be the filter that was saved, of whatever images that was made.

        Raises:
            ValueError: they had another shape, or the filter another exponent or power.
        """
        for name, only in (("exponent", 2.0), ("power", 1.0)):  # an earlier version knew no other
            saved, own = state.get(name, only), getattr(self, name)
            if saved != own:
                raise ValueError(
                    f"cannot load this error filter state: its {name} is {saved}, not {own}; to go on with that, give "
                    "the `error_filter=` (--error_filter) that it was made by: wiener has the exponent 2, "
                    "wiener_ode 1, wiener_amplitude 1 and the power 0.5"
                )
        saved, own = (list(variances.shape) for variances in (state["variances"], self.spectrum.variances))
        if saved != own:
            raise ValueError(f"cannot load this error filter state: it is of images of {saved}, this filter of {own}")
        spectrum = Spectrum(*(state[name].cpu().clone() for name in Spectrum._fields))  # wherever it was loaded to
        self._make_tables(spectrum, state["plain_fraction"])
