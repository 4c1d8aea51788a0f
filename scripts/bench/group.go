package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A group holds the processes of one proxy: those it starts later, too. It is
// a cgroup of its own (v2, no controllers needed), or where none can be made
// the tree of processes below the first.
type group struct {
	Dir string // of the cgroup, "" when there is none
	PID int    // of the first process
}

// newGroup makes a cgroup below the mount point, or a group without one when
// there is no mount point.
func newGroup(mount, name string) (*group, error) {
	if mount == "" {
		return &group{}, nil
	}
	dir := filepath.Join(mount, fmt.Sprintf("wayout-bench-%d-%s", os.Getpid(), name))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make a cgroup: %w", err)
	}
	return &group{Dir: dir}, nil
}

// cgroupMount finds the cgroup v2 file system, "" when it is mounted nowhere.
func cgroupMount() (string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	for in.Scan() {
		if w := strings.Fields(in.Text()); len(w) > 2 && w[2] == "cgroup2" {
			return w[1], nil
		}
	}
	return "", in.Err()
}

// cpu is the time in seconds that the group has used since it began, in user
// and kernel mode, with its processes that have ended.
func (g *group) cpu() (float64, error) {
	if g.Dir == "" {
		return g.treeCPU()
	}
	b, err := os.ReadFile(filepath.Join(g.Dir, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "usage_usec "); ok {
			us, err := strconv.ParseFloat(v, 64)
			return us / 1e6, err
		}
	}
	return 0, fmt.Errorf("%s: no usage_usec in cpu.stat", g.Dir)
}

// tick is the unit of the times in /proc/PID/stat (USER_HZ, 100 everywhere).
const tick = 1.0 / 100

func (g *group) treeCPU() (float64, error) {
	pids, err := g.pids()
	if err != nil {
		return 0, err
	}
	sum := 0.0
	for _, pid := range pids {
		f, err := procStat(pid)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		for _, i := range []int{11, 12, 13, 14} { // utime, stime, and those of waited-for children
			v, err := strconv.ParseFloat(f[i], 64)
			if err != nil {
				return 0, err
			}
			sum += v * tick
		}
	}
	return sum, nil
}

// procStat gives the fields of /proc/PID/stat from the third, the state, on.
func procStat(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	s := string(b)
	f := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	if len(f) < 15 {
		return nil, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(f))
	}
	return f, nil
}

// pids lists the processes of the group.
func (g *group) pids() ([]int, error) {
	if g.Dir == "" {
		return g.tree()
	}
	var all []int
	// A daemon may have made a cgroup of its own below ours.
	err := filepath.WalkDir(g.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return err
		}
		for f := range strings.FieldsSeq(string(b)) {
			pid, err := strconv.Atoi(f)
			if err != nil {
				return err
			}
			all = append(all, pid)
		}
		return nil
	})
	return all, err
}

// tree lists the first process and its descendants.
func (g *group) tree() ([]int, error) {
	if g.PID == 0 {
		return nil, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	children := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		f, err := procStat(pid)
		if err != nil {
			continue // it has ended meanwhile
		}
		parent, err := strconv.Atoi(f[1])
		if err != nil {
			return nil, err
		}
		children[parent] = append(children[parent], pid)
	}
	all := []int{g.PID}
	for i := 0; i < len(all); i++ {
		all = append(all, children[all[i]]...)
	}
	return all, nil
}

// footprint is what a group holds.
type footprint struct {
	PssKB   int64 `json:"pss_kb"`
	Files   int64 `json:"files"`
	Threads int64 `json:"threads"`
}

func (g *group) footprint() (footprint, error) {
	var sum footprint
	pids, err := g.pids()
	if err != nil {
		return sum, err
	}
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/", pid)
		b, err := os.ReadFile(dir + "smaps_rollup")
		if err != nil {
			continue // it has ended meanwhile
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 2 || f[0] != "Pss:" {
				continue
			}
			kb, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return sum, err
			}
			sum.PssKB += kb
		}
		files, err := os.ReadDir(dir + "fd")
		if err != nil {
			return sum, err
		}
		threads, err := os.ReadDir(dir + "task")
		if err != nil {
			return sum, err
		}
		sum.Files += int64(len(files))
		sum.Threads += int64(len(threads))
	}
	return sum, nil
}

// end kills what is left of the group, and removes the cgroup.
func (g *group) end() error {
	if g.Dir == "" {
		return nil
	}
	if err := os.WriteFile(filepath.Join(g.Dir, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("end the processes of a cgroup: %w", err)
	}
	var dirs []string
	if err := filepath.WalkDir(g.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	}); err != nil {
		return err
	}
	// A killed process leaves its cgroup when it has been torn down.
	for until := time.Now().Add(5 * time.Second); len(dirs) > 0; {
		last := len(dirs) - 1
		err := os.Remove(dirs[last])
		switch {
		case err == nil:
			dirs = dirs[:last]
		case time.Now().After(until):
			return fmt.Errorf("remove a cgroup: %w", err)
		default:
			time.Sleep(10 * time.Millisecond)
		}
	}
	return nil
}
