"""Attacks that try to do harm: to files, to processes, to the computer, to those who read the results."""

import copy

from attack_parts import (
    BELL,
    DAEMON,
    DEATHS,
    FILES,
    FOLDER,
    FOLDERS,
    HTML,
    LEAKS,
    LIMITS,
    NETWORK,
    ONE,
    PAGES,
    POSED,
    PROCESSES,
    REST,
    SHADOWS,
    Attack,
    added,
    deep,
    links,
    odd_names,
    only_a_link,
    within,
)
from nbformat.v4 import new_code_cell
from submissions import AUTOMATIC, solved

HARM = [
    Attack("gradebook", FILES, "Sets every score in the gradebook.", added(
        "import glob, sqlite3\nfor path in ['COURSE/gradebook.db', *glob.glob('/**/gradebook.db')]:\n"
        "    book = sqlite3.connect(path)\n"
        "    book.execute('update grade set manual_score = 1000, auto_score = 1000')\n"
        "    book.commit()"), AUTOMATIC, sandbox=True, sample=True),
    Attack("writes", FILES, "Overwrites solutions, releases, other submissions and graded notebooks.", added(
        "import glob, os\n"
        "for path in glob.glob('COURSE/*/**/*', recursive=True) + ['HOME_FOLDER/canary', 'COURSE/owned']:\n"
        "    try:\n        if os.path.isfile(path) or 'owned' in path: open(path, 'w').write('owned')\n"
        "    except OSError:\n        pass"), AUTOMATIC, sandbox=True, sample=True),
    Attack("reads", FILES, "Reads the secret, other submissions, keys and passwords, and prints them.", added(
        "import glob\n"
        "for path in ['COURSE/.course/grading-secret', 'HOME_FOLDER/canary', '/etc/shadow', '/etc/passwd',\n"
        "             *glob.glob('/root/.ssh/*'), *glob.glob('/home/*/.ssh/*'), "
        "*glob.glob('COURSE/submitted/*/*/*.txt')]:\n"
        "    try: print(path, open(path).read())\n    except OSError as error: print(error)"), AUTOMATIC, sandbox=True,
        sample=True),
    Attack("environment", FILES, "Prints the environment and the command lines of all processes.", added(
        "import glob, os\nprint(dict(os.environ))\nfor path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try: print(open(path, errors='replace').read())\n    except OSError as error: print(error)"),
        AUTOMATIC, sandbox=True),
    Attack("kill-all", PROCESSES, "Kills every process that it may.", added(
        "import os, signal\nos.kill(-1, signal.SIGKILL)"), AUTOMATIC, sandbox=True, sample=True),
    Attack("kill-server", PROCESSES, "Sends all signals to its parent and to process 1.", added(
        "import os, signal, time\nfor number in range(1, 65):\n    for pid in {os.getppid(), 1}:\n"
        "        try: os.kill(pid, number)\n        except (OSError, ValueError): pass\ntime.sleep(.1)"),
        AUTOMATIC, sandbox=True),
    Attack("server-memory", PROCESSES, "Writes into the memory of the server that starts submissions.", added(
        "import ctypes, os\nlib = ctypes.CDLL(None, use_errno=True)\n"
        "for pid in {os.getppid(), 1}:\n    print(lib.ptrace(16, pid, 0, 0), os.strerror(ctypes.get_errno()))\n"
        "    for name in ('mem', 'fd', 'maps', 'environ'):\n"
        "        try:\n"
        "            print(os.listdir(f'/proc/{pid}/{name}') if name == 'fd' else open(f'/proc/{pid}/{name}', 'rb+'))\n"
        "        except OSError as error: print(error)"), AUTOMATIC, sandbox=True),
    Attack("server-limits", PROCESSES, "Lowers the limits of the server, which later submissions inherit.", added(
        "import os, resource\nfor name, most in (('NOFILE', 12), ('CPU', 1), ('FSIZE', 0), ('NPROC', 1)):\n"
        "    resource.prlimit(os.getppid(), getattr(resource, 'RLIMIT_' + name), (most, most))"),
           AUTOMATIC, sandbox=True,
        sample=True),
    Attack("server-priority", PROCESSES, "Makes the server wait behind every other process.", added(
        "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)\n"
        "os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))\n"
        "os.sched_setaffinity(os.getppid(), {min(os.sched_getaffinity(0))})"), AUTOMATIC, sandbox=True),
    Attack("namespace", PROCESSES, "Makes a user namespace in which it is root, and mounts a disk without limit.",
           added(
        "import ctypes, subprocess\nprint(ctypes.CDLL(None).unshare(0x10000000 | 0x20000))\n"
        "print(subprocess.run(['unshare', '-Urm', 'mount', '-t', 'tmpfs', 'x', '/tmp']).returncode)"), AUTOMATIC,
        sandbox=True),
    Attack("daemon", PROCESSES, "Leaves a process behind, in a session of its own, that ignores signals.",
           added(DAEMON), AUTOMATIC, sample=True),
    Attack("threads", PROCESSES, "Leaves threads that go on, and handlers for the end.", added(
        "import atexit, threading, time\natexit.register(lambda: time.sleep(60))\n"
        "for _ in range(20):\n    threading.Thread(target=time.sleep, args=(60,)).start()"), AUTOMATIC),
    Attack("stubborn", PROCESSES, "Ignores all signals and never ends.", added(
        "import signal\nfor number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGXCPU):\n"
        "    signal.signal(number, signal.SIG_IGN)\nsignal.signal = lambda *a: None\nwhile True: pass"),
        AUTOMATIC, found="could not be interrupted"),
    Attack("alarm", PROCESSES, "Sets an alarm that raises in whatever runs later.", added(
        "import signal\ndef ring(*a): raise SystemExit('ring')\nsignal.signal(signal.SIGALRM, ring)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0, 0)"), AUTOMATIC),
    Attack("sleeps", PROCESSES, "Sleeps in one of its functions.", within("import time\ntime.sleep(3600)"), REST),
    Attack("fork-bomb", LIMITS, "Forks until it may no more, 2000 times at most.", added(
        "import os, time\nfor _ in range(2000):\n    try:\n        if os.fork() == 0:\n            time.sleep(60)\n"
        "            os._exit(0)\n    except OSError:\n        break"), AUTOMATIC, plain=False),
    Attack("memory", LIMITS, "Takes 6 GB of memory.", added(
        "x = []\nfor _ in range(60): x.append(bytearray(100_000_000))"), AUTOMATIC, sample=True, plain=False),
    Attack("memory-shared", LIMITS, "Takes memory that several processes share, which no limit of one counts.", added(
        "import mmap, os, time\nfor _ in range(4):\n    if os.fork() == 0:\n        m = mmap.mmap(-1, 500_000_000)\n"
        "        for i in range(50): m[i * 10**7 : (i + 1) * 10**7] = b'x' * 10**7\n        time.sleep(20)\n"
        "        os._exit(0)\ntime.sleep(20)"), AUTOMATIC, plain=False),
    Attack("memory-of-nobody", LIMITS, "Takes memory in files that have no name and belong to no process.", added(
        "import os\nfor _ in range(20):\n    file = os.memfd_create('x')\n"
        "    for _ in range(25): os.write(file, b'x' * 4_000_000)"), AUTOMATIC, plain=False),
    Attack("disk", LIMITS, "Writes 1 GB.", added(
        "for i in range(10):\n    with open(f'f{i}', 'wb') as file:\n"
        "        for _ in range(25): file.write(b'x' * 4_000_000)"),
        AUTOMATIC, sandbox=True, plain=False),
    Attack("deep-folders", LIMITS, "Makes 10,000 folders in one another.", added(FOLDERS), AUTOMATIC,
           plain=False),
    Attack("locked-folders", LIMITS, "Leaves files that cannot be removed.", added(
        "import os\nos.makedirs('a/b/c')\nopen('a/b/c/f', 'w').write('x')\n"
        "for name in ('a/b/c/f', 'a/b/c', 'a/b', 'a'): os.chmod(name, 0)"), AUTOMATIC),
    Attack("shared-memory", LIMITS, "Leaves files in /dev/shm and blocks of System V memory.", added(
        "import ctypes\nlib = ctypes.CDLL(None)\nprint(lib.shmget(4242, 1_000_000, 0o1666), lib.msgget(4242, 0o1666))\n"
        "try: open('/dev/shm/MARK', 'w').write('x')\nexcept OSError: pass"), AUTOMATIC, sandbox=True),
    Attack("prints", LIMITS, "Prints 100 MB.", added("for _ in range(100_000): print('x' * 1000)"), AUTOMATIC,
           plain=False),
    Attack("writes-to-files", LIMITS, "Writes to all of its open files.", added(
        "import os\nfor number in (0, 1, 2):\n    for _ in range(100):\n"
        "        try: os.write(number, b'x' * 100_000)\n        except OSError: break"), AUTOMATIC, plain=False),
    Attack("stderr", LIMITS, "Prints to stderr, which costs plain nbgrader's students their points.", added(
        "import sys\nfor _ in range(1500): print('warning ' * 10, file=sys.stderr)"), AUTOMATIC),
    Attack("exits", DEATHS, "Ends the process from within a function.", within("import os\nos._exit(0)"), REST,
           sample=True, found="died"),
    Attack("segfault", DEATHS, "Reads address zero.",
           added("import ctypes\nctypes.string_at(0)"), AUTOMATIC, sample=True,
           found="died"),
    Attack("sys-exit", DEATHS, "Raises SystemExit from within a function.", within("raise SystemExit('bye')"), REST),
    Attack("keyboard-interrupt", DEATHS, "Raises KeyboardInterrupt from within a function.", within(
        "raise KeyboardInterrupt"), REST),
    Attack("base-exception", DEATHS, "Raises an exception that nobody expects.", within(
        "class E(BaseException):\n    def __str__(self): raise self\nraise E"), REST),
    Attack("bad-exception", DEATHS, "Raises an exception that cannot be printed.", within(
        "class E(Exception):\n    def __str__(self): raise self\nraise E"), REST),
    Attack("recursion", DEATHS, "Calls itself without end.", within(f"return {ONE}(*arguments)"), REST),
    Attack("dies-everywhere", DEATHS, "Ends the process in each of forty cells.",
           lambda release: (lambda n: (n.cells.extend(
        new_code_cell(f"import os\nos._exit({i})") for i in range(40)), n)[1])(solved(release)),
           AUTOMATIC, found="died"),
    Attack("calls-home", NETWORK, "Connects to a port of the grader's computer.", added(
        "import socket\nfor host in ('127.0.0.1', 'localhost', '::1', '10.0.2.2'):\n"
        "    try: socket.create_connection((host, PORT), 1).sendall(b'owned')\n"
        "    except OSError as error: print(error)"),
        AUTOMATIC, sandbox=True, sample=True),
    Attack("looks-up", NETWORK, "Asks for an address outside.", added(
        "import socket\ntry: print('found', socket.getaddrinfo('example.org', 443))\n"
        "except OSError as error: print(error)"),
        AUTOMATIC, sandbox=True),
    Attack("abstract-socket", NETWORK, "Connects to a socket without a place, of the grader's computer.", added(
        "import socket\nfor address in ('\\0MARK', '/var/run/docker.sock', '/run/dbus/system_bus_socket'):\n"
        "    try:\n        s = socket.socket(socket.AF_UNIX)\n        s.connect(address)\n        s.sendall(b'owned')\n"
        "    except OSError as error: print(error)\n"
        "try: socket.socket(40).connect((2, 22))\nexcept OSError as error: print(error)"), AUTOMATIC, sandbox=True),
    Attack("link", FOLDER, "Hands in a link to another student's notebook.", solved, 0, beside=only_a_link, sample=True,
           found="link"),
    Attack("links-beside", FOLDER, "Puts links to the gradebook, a pipe and a loop beside the notebook.", added(
        "import os\nprint(sorted(os.listdir('.')))"), AUTOMATIC, beside=links),
    Attack("shadows", FOLDER, "Puts modules beside the notebook that are named as the server's own.", solved, AUTOMATIC,
           beside=SHADOWS, sample=True),
    Attack("poses", FOLDER, "Puts a report, a gradebook and a configuration beside the notebook.", copy.deepcopy, 0,
           beside=POSED),
    Attack("odd-names", FOLDER, "Names files with line breaks, escape sequences and commands.", solved, AUTOMATIC,
           beside=odd_names, sample=True),
    Attack("deep-beside", FOLDER, "Puts 1500 folders in one another beside the notebook.",
           solved, AUTOMATIC, beside=deep,
           plain=False),
    Attack("html", PAGES, "Shows HTML, JavaScript and SVG.", added(
        f"from IPython.display import HTML, SVG, Javascript, display\ndisplay(HTML({HTML!r}), Javascript('alert(1)'))\n"
        "display({'image/svg+xml': '<svg onload=alert(1)>', 'text/html': 'x', 'image/png': '\"><script>'}, raw=True)\n"
        f"print({HTML!r})"), AUTOMATIC, sample=True),
    Attack("html-errors", PAGES, "Raises errors whose names and messages are HTML.", within(
        f"raise type({HTML!r}, (Exception,), {{}})({HTML!r})"), REST),
    Attack("<b onclick=alert(1)>\x1b[31m", PAGES, "Has a name that is HTML and colours the terminal.",
           solved, AUTOMATIC),
    Attack("terminal", PAGES, "Prints and raises escape sequences.", within(
        f"print('{BELL}')\nraise ValueError('{BELL}')"), REST, sample=True),
    Attack("long-message", PAGES, "Raises an error with a message of 50 MB.",
           within("raise ValueError('x' * 50_000_000)"),
           REST),
    Attack("raises-inputs", LEAKS, "Raises its arguments as a message.",
           within("raise ValueError(repr(arguments))"), REST,
           sample=True),
    Attack("keeps-inputs", LEAKS, "Keeps its arguments, and shows them in a later cell.", lambda release: (lambda n: (
        n.cells.append(new_code_cell("print(kept)")), n)[1])(within(
            "global kept\nkept = globals().get('kept', []) + [arguments]\nreturn 0.0")(release)), REST),
    Attack("leaves-inputs", LEAKS, "Writes its arguments to wherever the next student might read.", within(
        "import os\nfor place in ('.', '..', '/tmp', '/dev/shm', '/var/tmp', os.environ.get('HOME', '.')):\n"
        "    try: open(place + '/leaked.txt', 'a').write(repr(arguments))\n    except OSError: pass\nreturn 0.0"), REST,
        sandbox=True),
    Attack("reads-leaks", LEAKS, "Reads what the one before has left.", added(
        "import glob\nfor place in ('.', '..', '/tmp', '/dev/shm', '/var/tmp'):\n"
        "    print([open(x).read() for x in glob.glob(place + '/leaked.txt')])"), AUTOMATIC, sandbox=True),
]  # fmt: skip
