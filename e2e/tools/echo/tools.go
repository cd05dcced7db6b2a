//go:build tools

// Package tools pins the echo server of the Gateway API's conformance suite; it is never built itself.
package tools

import (
	_ "istio.io/istio/pkg/test/echo/cmd/client"
	_ "istio.io/istio/pkg/test/echo/cmd/server"
)
