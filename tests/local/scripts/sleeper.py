"""A script without any library, that goes on until it is ended."""

import time

print("at work", flush=True)
while True:
    time.sleep(0.1)
