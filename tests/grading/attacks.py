"""Submissions that cheat, and (from `attacks_harm.py`) those that try to do harm: data for `test_attacks.py` and
`benchmarks/attacks.py`. Each says how it is made, and what its own mathematics earns."""

from attack_parts import (
    EVERYWHERE,
    FORGED,
    HOOKS,
    IMPORTS,
    LIES,
    LYING,
    METADATA,
    PATCHES,
    PEEKING,
    REST,
    SOCKETS,
    Attack,
    added,
    changed,
    first,
    functions,
    other_language,
    twice,
    unlocked,
    with_outputs,
    within,
)
from attacks_harm import HARM
from submissions import AUTOMATIC, edited, solved, tagged, without_points_cells

CHEATS = [
    Attack("torch-says-equal", PATCHES, "Makes torch's comparisons say that all is equal.", first(
        "import torch, torch.testing\ntorch.testing.assert_close = lambda *a, **k: None\n"
        "torch.allclose = torch.equal = lambda *a, **k: True\n"
        "torch.isclose = torch.eq = lambda a, *b, **k: torch.ones_like(torch.as_tensor(a), dtype=bool)\n"
        "torch.Tensor.all = lambda self, *a: True"), 0, sample=True),
    Attack("compare-says-equal", PATCHES, "Replaces the functions that compare, in the grader's own modules.", first(
        "import cs336_alignment.grading.compare as c\n"
        "c.difference = c.value_difference = c.tensor_difference = lambda *a, **k: None\n"
        "try:\n    import cs336_alignment.grading.exercise as e\n    e.difference = c.difference\n"
        "except ImportError:\n    pass"), 0),
    Attack("builtins", PATCHES, "Replaces sum, abs, all, zip and float.", first(
        "import builtins\nbuiltins.all = lambda *a: True\nbuiltins.any = lambda *a: False\n"
        "builtins.sum = lambda *a: 1000.0\nbuiltins.float = lambda *a: 1000.0"), 0),
    Attack("probe-patched", PATCHES, "Replaces what writes down the answers.", first(
        "import cs336_alignment.grading.kernel as k, cs336_alignment.grading.probe as p\n"
        "k.run_calls = p.run_calls = p.run_call = lambda f, calls, *a, **b: [{'value': 1.0, 'changed': []} "
        "for _ in calls]\n"
        "k.encode_results = lambda r: [{'value': True, 'points': 1000}]"), 0),
    Attack("json-patched", PATCHES, "Replaces json.dumps and loads.", first(
        "import json\nold = json.dumps\n"
        "json.dumps = lambda x, **k: old({'answer': [{'value': 1.0}] * 9, 'points': 1000, 'end': True}, **k)"), 0),
    Attack("grade-replaced", PATCHES, "Puts a module of its own in the place of the one that gives points.", first(
        "import sys, types\nfor name in ('plain', 'score', 'exercise', 'compare'):\n"
        "    fake = types.ModuleType(name)\n    fake.grade = lambda name, f: {'dpo_loss': 15.0}.get(name, 5.0)\n"
        "    fake.difference = lambda *a: None\n    sys.modules['cs336_alignment.grading.' + name] = fake"), 0),
    Attack("ast-transformer", HOOKS, "Takes assertions and raises out of every cell.", first(
        "import ast\nclass Blind(ast.NodeTransformer):\n"
        "    def visit_Assert(self, node): return ast.Pass()\n    def visit_Raise(self, node): return ast.Pass()\n"
        "    def visit_Call(self, node):\n"
        "        return ast.Constant(5.0) if getattr(node.func, 'id', '') == 'grade' else self.generic_visit(node)\n"
        "get_ipython().ast_transformers.append(Blind())"), 0, sample=True),
    Attack("run-code", HOOKS, "Replaces the shell's run_code, run_cell and showtraceback.", first(
        "shell = get_ipython()\nshell.run_code = lambda *a, **k: None\nshell.showtraceback = lambda *a, **k: None\n"
        "shell.run_cell = lambda *a, **k: print('15.0')"), 0),
    Attack("input-transformer", HOOKS, "Rewrites the source of later cells.", first(
        "get_ipython().input_transformers_post.append("
        "lambda lines: ['5.0\\n'] if any('grade(' in x for x in lines) else lines)"), 0),
    Attack("post-run-cell", HOOKS, "Shows points after every cell.", first(
        "from IPython.display import display\n"
        "get_ipython().events.register('post_run_cell', lambda *a: display(15.0))"), 0),
    Attack("displayhook", HOOKS, "Shows points in the place of every value.", first(
        "import sys\nshell = get_ipython()\n"
        "class Rich:\n    def __call__(self, value=None):\n        old(15.0)\n"
        "old = sys.displayhook\nsys.displayhook = shell.displayhook = Rich()\n"
        "shell.display_trap.hook = sys.displayhook"),
        0),
    Attack("settrace", HOOKS, "Traces every call and looks for expected values among the variables.", first(
        "import sys\nfound = []\ndef watch(frame, event, argument):\n"
        "    for name in ('expected', 'wanted', 'reference'):\n"
        "        if name in frame.f_locals:\n            found.append(frame.f_locals[name])\n    return watch\n"
        "sys.settrace(watch)", "found[-1]"), 0),
    Attack("import-hook", HOOKS, "Serves every import of the grader from a finder of its own.", first(
        "import sys, types, importlib.abc, importlib.machinery\n"
        "class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if 'grading' in name: return importlib.machinery.ModuleSpec(name, self)\n"
        "    def create_module(self, spec): return types.ModuleType(spec.name)\n"
        "    def exec_module(self, module): module.grade = lambda *a: 5.0\n"
        "for name in [n for n in sys.modules if 'grading' in n]: del sys.modules[name]\n"
        "sys.meta_path.insert(0, Finder())"), 0),
    Attack("looks-like-points", HOOKS, "Returns objects that print as the most points.", functions(
        "class P(float):\n    def __repr__(self): return '15.0'\n    def __eq__(self, other): return True\n"
        "    def __hash__(self): return 0\ndef NAME(*a):\n    print('15.0')\n    return P(15.0)"), 0),
    Attack("forged-answers", FORGED, "Writes answers and the end of the step to the grader's socket itself.", functions(
        SOCKETS +
        "tell(json.dumps({'answer': [{'value': 1, 'changed': []}] * 9}).encode() + b'\\n{\"end\": true}\\n')\n"
        "def NAME(*a):\n    return a[0]"), 0, sample=True),
    Attack("forged-points", FORGED, "Says points in the place of answers.", first(SOCKETS +
        "for _ in range(50): tell(b'{\"points\": 1000, \"score\": 80, \"right\": true, \"answer\": [], "
        "\"end\": 1}\\n')"),
           0),
    Attack("takes-over", FORGED, "Reads the probes to come and answers each input with the input.", first(SOCKETS +
        "for wire in wires:\n    wire.setblocking(True)\n    file = wire.makefile('rwb')\n"
        "    file.write(b'{\"end\": 1}\\n'); file.flush()\n"
        "    for line in file:\n        step = json.loads(line)\n"
        "        for case in step.get('cases', []):\n"
        "            answer = [{'value': call[0], 'changed': []} for call in case['calls']]\n"
        "            file.write(json.dumps({'answer': answer}).encode() + b'\\n')\n"
        "        file.write(b'{\"end\": 1}\\n'); file.flush()"), 0, sample=True),
    Attack("all-errors", FORGED, "Claims for each call to have raised what might be asked for.", first(SOCKETS +
        "import cs336_alignment.grading.kernel as k\n"
        "k.encode_results = lambda results: [{'error': 'ValueError'} for _ in results]"), 0),
    Attack("giant-line", FORGED, "Sends a line of 25 MB.", added(SOCKETS +
        "tell(b'{\"output\": \"' + b'x' * 25_000_000 + b'\"}\\n')"), AUTOMATIC, plain=False),
    Attack("endless-line", FORGED, "Sends bytes without end and without a line's end.", added(SOCKETS +
        "while True: tell(b'x' * 65536)\n"), AUTOMATIC, found="printed more than", plain=False),
    Attack("endless-lines", FORGED, "Sends empty lines without end, so that nobody looks at the clock.", added(SOCKETS +
        "while True:\n    try: tell(b'\\n' * 65536)\n    except BaseException: pass"),
           AUTOMATIC, found="", plain=False),
    Attack("garbage", FORGED, "Sends bytes that are no text and JSON that nests without end.", added(SOCKETS +
        "tell(os.urandom(100_000) + b'\\n' + b'[' * 200_000 + b'\\n' + b'{\"output\": {\"output_type\": [], "
        "\"data\": 1}}\\n'"
        " + b'{\"output\": 7}\\n{\"answer\": {}}\\n{\"answer\": 1e999}\\n[]\\nnull\\n')"), AUTOMATIC),
    Attack("heavy-json", FORGED, "Sends JSON whose values take a hundred times its length in memory.", added(SOCKETS +
        "tell(b'{\"answer\": [' + b'{\"\":{}},' * 2_500_000 + b'0]}\\n')"), AUTOMATIC, plain=False),
    *(Attack(f"odd-answer-{i}", FORGED, f"Answers with parts of the wrong kind: {text}.", first(
        "import cs336_alignment.grading.kernel as k\n"
        f"k.encode_results = lambda results: [{text} for _ in results]"), 0, sample=i == 0)
      for i, text in enumerate((
          "{'error': 'x', 'line': 7, 'message': [1]}", "{'value': 1, 'changed': [-1000, 'x']}",
          "{'value': 1, 'gradients': 7, 'after': 'abc', 'changed': 5}", "{'value': 10**4000}",
          "{'value': {'tensor': 'float32', 'shape': [1] * 300_000, 'bits': 'AAAAAAAA8D8='}}",
          "{'error': ['ValueError'], 'value': 1}", "{'value': {'other': 'x' * 1_000_000}}",
          "{'value': {'tensor': 'float32', 'shape': [0, 10**15], 'bits': ''}}"))),
    Attack("torch-function", LYING, "Returns a tensor whose comparisons are always true.",
           functions(LIES), 0, sample=True),
    Attack("always-equal", LYING, "Returns an object that equals everything.", functions(
        "class Yes:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    __hash__ = None\n    def __float__(self): return 1.0\n    def __getattr__(self, name): return self\n"
        "    def __call__(self, *a, **k): return self\ndef NAME(*a):\n    return Yes()"), 0),
    Attack("says-it-is-a-tensor", LYING, "Returns an object whose class claims to be Tensor.", functions(
        "import torch\nclass Yes:\n    __class__ = torch.Tensor\n    dtype = torch.float32\n    shape = ()\n"
        "    def __getattr__(self, name): return lambda *a, **k: self\ndef NAME(*a):\n    return Yes()"), 0),
    Attack("nan", LYING, "Returns NaN, which compares as false with everything.", functions(
        "def NAME(*a):\n    return float('nan')"), 0),
    Attack("infinity", LYING, "Returns infinities of every shape.", functions(
        "import torch\ndef NAME(*a):\n"
        "    return torch.full_like(a[0], -torch.inf) if torch.is_tensor(a[0]) else -torch.inf"),
        0),
    Attack("raises-for-everything", LYING, "Raises the error that some cases want, for all.", functions(
        "def NAME(*a):\n    raise ValueError('no')"), 0),
    Attack("huge-integer", LYING, "Returns an integer of 300 digits.", within("return 10**300"), REST),
    Attack("huge-shape", LYING, "Returns a tensor of 10^12 values that takes no memory until it is written down.",
           within(
        "import torch\nreturn torch.zeros(1).expand(10**12)"), REST),
    Attack("odd-types", LYING, "Returns a sparse tensor.",
           within("import torch\nreturn torch.eye(3).to_sparse()"), REST),
    Attack("lying-gradient", LYING, "Returns a constant whose backward pass invents gradients.", functions(
        "import torch\nclass Any(torch.autograd.Function):\n"
        "    @staticmethod\n    def forward(ctx, *x):\n        ctx.n = x\n        return torch.zeros(())\n"
        "    @staticmethod\n    def backward(ctx, g):\n        return tuple(torch.ones_like(x) for x in ctx.n)\n"
        "def NAME(*a):\n    return Any.apply(*[x for x in a if torch.is_tensor(x)])"), 0),
    Attack("pickles", LYING, "Returns an object that runs a command when it is unpickled.", functions(
        "import os\nclass Evil:\n    def __reduce__(self): return os.system, ('touch COURSE/owned',)\n"
        "def NAME(*a):\n    return [Evil(), {'x': Evil()}]"), 0),
    Attack("endless-value", LYING, "Returns a list that contains itself.", within(
        "x = []\nx.append(x)\nreturn x"), REST),
    Attack("overwrites-inputs", LYING, "Changes its arguments, so that a comparison sees what it wants.", functions(
        "import torch\ndef NAME(*a):\n    for x in a:\n        if torch.is_tensor(x):\n"
        "            x.data.zero_()\n    return a[0]"), 0),
    Attack("frames", PEEKING, "Looks through the frames above it for expected values and the reference.", functions(
        "def NAME(*arguments):\n    import sys\n    frame = sys._getframe()\n    while frame:\n"
        "        for space in (frame.f_locals, frame.f_globals):\n"
        "            for key in ('expected', 'wanted', 'reference', 'exercise', 'EXERCISE', 'question'):\n"
        "                if key in space:\n                    thing = space[key]\n"
        "                    return getattr(thing, 'reference', lambda *a: thing)(*arguments)\n"
        "        frame = frame.f_back\n    raise LookupError('nothing to steal')"), 0, sample=True),
    Attack("garbage-collector", PEEKING, "Looks through all objects for exercises and their references.", functions(
        "def NAME(*arguments):\n    import gc\n    for thing in gc.get_objects():\n"
        "        if type(thing).__name__ == 'Exercise' and thing.name == 'NAME':\n"
        "            return thing.reference(*arguments)\n    raise LookupError('nothing to steal')"), 0),
    Attack("history", PEEKING, "Looks for hidden tests in the shell's history and in the sources of its callers.",
           first(
        "import inspect\ntext = ''.join(In)\nfor frame in inspect.stack():\n"
        "    text += ''.join(frame.code_context or [])",
        "eval(text.split('expected = ')[1])"), 0),
    Attack("visible-table", PEEKING, "Answers from the table of the visible cases.", functions(
        "import json, pathlib, cs336_alignment.grading.check as check\n"
        "from cs336_alignment.grading.probe import decode, encode\n"
        "table = json.loads((check.VISIBLE / 'NAME.json').read_text())\n"
        "def NAME(*arguments):\n    for case in table['cases']:\n"
        "        for call, expected in zip(case['calls'], case['expected']):\n"
        "            if [encode(x) for x in arguments] == call:\n                return decode(expected['value'])\n"
        "    return decode(table['cases'][0]['expected'][0]['value'])"), 0),
    Attack("tags", METADATA, "Tags every cell with skip-execution.", tagged, 0, sample=True, found="tags"),
    Attack("points-1000", METADATA, "Says that its cells are worth 1000 points, with the number as source.", edited, 0,
           sample=True, found="points"),
    Attack("unlocked", METADATA, "Takes locks and grades off the cells with points.", changed(unlocked), 0),
    Attack("own-outputs", METADATA, "Hands in points cells with outputs.", with_outputs, 0),
    Attack("twice", METADATA, "Holds every cell with an id twice.", twice, 0),
    Attack("deleted", METADATA, "Deletes the cells with points from a solved notebook.",
           lambda release: without_points_cells(solved(release)), AUTOMATIC, found="missing"),
    Attack("foreign-kernel", METADATA, "Says that it is a notebook of another language.", other_language, AUTOMATIC),
    Attack("other-ids", METADATA, "Gives one exercise's easy answer the ids of the others.", changed(
        lambda cell, grader: grader.update(grade_id="implicit_reward")), 0),
    Attack("package", IMPORTS, "Imports the reference from the package and from the grader's modules.", functions(
        "def NAME(*arguments):\n    import importlib\n"
        "    for module in ('dpo', 'exact', 'tokens', 'corner', 'grading.exercises.NAME', 'grading.plain', "
        "'grading.score'):\n"
        "        try:\n            found = importlib.import_module('cs336_alignment.' + module)\n"
        "            found = getattr(found, 'EXERCISE', found)\n"
        "            return getattr(found, 'reference', getattr(found, 'NAME', None))(*arguments)\n"
        "        except (ImportError, AttributeError, NotImplementedError, TypeError):\n            pass\n"
        "    raise LookupError('nothing to import')"), 0, sample=True),
    Attack("everywhere", IMPORTS, "Searches site-packages, editable installs, other processes' roots and homes.",
           functions(EVERYWHERE), 0, sandbox=True, sample=True),
    Attack("solutions", IMPORTS, "Reads the solutions' notebook and runs it.", functions(
        "def NAME(*arguments):\n    import glob, json\n"
        "    for path in glob.glob('COURSE/s*/**/*.ipynb', recursive=True) + glob.glob('/**/solutions/*/*.ipynb'):\n"
        "        for cell in json.load(open(path))['cells']:\n            source = ''.join(cell['source'])\n"
        "            if 'def NAME(' in source and 'NotImplemented' not in source:\n"
        "                space = dict(globals())\n                exec(source, space)\n"
        "                return space['NAME'](*arguments)\n    raise LookupError('nothing to read')"), 0, sandbox=True),
    Attack("wheels", IMPORTS, "Searches caches and the whole disk for the package.", functions(
        "import subprocess\nfound = subprocess.run('find / -xdev -name dpo.py -path *cs336* 2>/dev/null', shell=True,\n"
        "                       capture_output=True, text=True, timeout=20).stdout.split()\n"
        "def NAME(*arguments):\n    for path in found:\n        space = {}\n        exec(open(path).read(), space)\n"
        "        try:\n            return space['NAME'](*arguments)\n"
        "        except (KeyError, NotImplementedError):\n            pass\n    raise LookupError"), 0, sandbox=True),
]  # fmt: skip
ATTACKS = [*CHEATS, *HARM]
