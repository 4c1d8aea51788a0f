package netcfg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// readNFT gives the nftables rules of the calling thread's namespace that
// translate source addresses, iptables-nft's among them.
func readNFT() ([]string, error) {
	// struct nfgenmsg: family (0: all), version, resource id.
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP)
	req.AddRawData([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0})
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWRULE)
	switch {
	case errors.Is(err, nl.ErrDumpInterrupted):
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return nil, nil // a kernel without nftables, or with it not loaded
	case err != nil:
		return nil, err
	}
	var out []string
	for _, m := range msgs {
		rule, err := parseNFTRule(m)
		if err != nil {
			return out, err
		}
		if rule != "" {
			out = append(out, rule)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// parseNFTRule reads the body of an NFT_MSG_NEWRULE message. It gives "" for a rule
// that leaves source addresses alone.
func parseNFTRule(b []byte) (string, error) {
	if len(b) < 4 {
		return "", errShort
	}
	family := nftFamily(b[0])
	var table, chain, does string
	err := eachAttr(b[4:], func(typ uint16, v []byte) error {
		switch typ {
		case unix.NFTA_RULE_TABLE:
			table = attrString(v)
		case unix.NFTA_RULE_CHAIN:
			chain = attrString(v)
		case unix.NFTA_RULE_EXPRESSIONS:
			return eachAttr(v, func(_ uint16, v []byte) error { // NFTA_LIST_ELEM
				word, err := nftExpression(v)
				if word != "" {
					does = word
				}
				return err
			})
		}
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("parse nftables rule: %w", err)
	}
	if does == "" {
		return "", nil
	}
	return fmt.Sprintf("%s %s %s: %s", family, table, chain, does), nil
}

// nftExpression says how one expression of a rule changes source addresses.
func nftExpression(b []byte) (string, error) {
	var name string
	var data []byte
	err := eachAttr(b, func(typ uint16, v []byte) error {
		switch typ {
		case unix.NFTA_EXPR_NAME:
			name = attrString(v)
		case unix.NFTA_EXPR_DATA:
			data = v
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	switch name {
	case "masq":
		return "masquerade", nil
	case "nat":
		snat := false
		err = eachAttr(data, func(typ uint16, v []byte) error {
			if typ == unix.NFTA_NAT_TYPE && len(v) >= 4 {
				snat = binary.BigEndian.Uint32(v) == unix.NFT_NAT_SNAT
			}
			return nil
		})
		if snat {
			return "snat", err
		}
	case "target": // an iptables target in nftables' clothes
		var target string
		err = eachAttr(data, func(typ uint16, v []byte) error {
			if typ == unix.NFTA_TARGET_NAME {
				target = attrString(v)
			}
			return nil
		})
		switch target {
		case "MASQUERADE":
			return "masquerade", err
		case "SNAT", "NETMAP":
			return "snat", err
		}
	}
	return "", err
}

func nftFamily(f byte) string {
	switch f {
	case unix.NFPROTO_INET:
		return "inet"
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_BRIDGE:
		return "bridge"
	case unix.NFPROTO_NETDEV:
		return "netdev"
	case unix.NFPROTO_ARP:
		return "arp"
	}
	return fmt.Sprintf("family %d", f)
}
