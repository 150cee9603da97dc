"""The two threads of a worker, which take turns with a baton."""

import threading

from aiollm.workers.flight import Flight
from aiollm.workers.loop import Loop


class Baton:
    """Strict turns between two threads: posts come in the order of the launches."""

    def __init__(self) -> None:
        self._mine = (threading.Semaphore(1), threading.Semaphore(0))

    def take(self, me: int) -> None:
        self._mine[me].acquire()

    def pass_on(self, me: int) -> None:
        self._mine[1 - me].release()


def run(loop: Loop) -> None:
    """Serve until the server says stop or goes away; raises what a turn raised."""
    baton = Baton()
    faults: list[BaseException] = []

    def overlap(me: int) -> None:
        flight: Flight | None = None
        try:
            with loop.stream.context():
                while True:
                    if flight is not None:
                        flight.pending.wait()
                    baton.take(me)
                    if faults:
                        return
                    flight = loop.turn(flight)
                    if loop.stopping and flight is None:
                        return
                    baton.pass_on(me)
                    loop.outbox.flush()
        except BaseException as error:  # noqa: BLE001  raised again by `run`
            faults.append(error)
            loop.abandon(error)
        finally:
            baton.pass_on(me)  # whatever ended this thread, the other one must not wait for it

    threads = [threading.Thread(target=overlap, args=(me,), name=f"overlap-{me}") for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loop.outbox.flush()
    if faults:
        raise faults[0]
