# The same recipes as `hatch run NAME`, for those who have just.
default:
    @just --list

setup:
    hatch env create

serve *args:
    hatch run serve {{args}}

generate *args:
    hatch run generate {{args}}

chat *args:
    hatch run chat {{args}}

bench *args:
    hatch run bench {{args}}

test *args:
    hatch run test {{args}}

test-core *args:
    hatch run test-core {{args}}

fmt:
    hatch run fmt

lint:
    hatch run lint

types:
    hatch run types

imports:
    hatch run imports

check:
    hatch run check

docs:
    hatch run docs

budgets:
    hatch run budgets
