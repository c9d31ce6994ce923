from miles_torch.engine import TorchEngine


class CountedEngine(TorchEngine):
    def __init__(self, options, context) -> None:
        super().__init__(options, context)
        self.requests = 0

    def generate(self, requests):
        self.requests += len(requests)
        (self.context.folder / f"requests-{self.context.index}.txt").write_text(f"{self.requests}\n")
        return super().generate(requests)
