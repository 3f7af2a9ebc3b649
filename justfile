# The same recipes as `hatch run NAME`, for those who have just.
set positional-arguments

default:
    @{{just_executable()}} --list

setup:
    hatch env create

serve *args:
    hatch run serve "$@"

generate *args:
    hatch run generate "$@"

chat *args:
    hatch run chat "$@"

bench *args:
    hatch run bench "$@"

test *args:
    hatch run test "$@"

test-core *args:
    hatch run test-core "$@"

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
