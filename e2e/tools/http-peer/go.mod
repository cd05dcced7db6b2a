module outrigger.dev/e2e/tools/http-peer

go 1.26.0
