from miles_torch.sync import TorchSender


class NotingSender(TorchSender):
    def send(self, buckets) -> None:
        super().send(self._noted(buckets))

    def _noted(self, buckets):
        count = 0
        for bucket in buckets:
            count += len(bucket.names)
            yield bucket
        print(f"published {count} tensors", flush=True)
