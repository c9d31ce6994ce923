import torch

from miles_torch.trainer import TorchTrainer


class AveragedTrainer(TorchTrainer):
    """For one rank, as an example; resuming starts the average anew."""

    def start(self) -> None:
        super().start()
        self.average = [parameter.detach().clone() for parameter in self._policy.parameters()]

    def update(self, batch, step, passes):
        report = super().update(batch, step, passes)
        for mean, parameter in zip(self.average, self._policy.parameters(), strict=True):
            mean.lerp_(parameter.detach(), 1 - self.options.decay)
        return report

    def save_pretrained(self, folder) -> None:
        own = [parameter.detach().clone() for parameter in self._policy.parameters()]
        self._put(self.average)
        super().save_pretrained(folder)
        self._put(own)

    @torch.no_grad()
    def _put(self, tensors) -> None:
        for parameter, tensor in zip(self._policy.parameters(), tensors, strict=True):
            parameter.copy_(tensor)
