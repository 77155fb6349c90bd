"""What `blockd --help` says."""

HELP = """\
Usage: blockd [options]

Serve disk images to guests over NBD, and stream or copy them while they are in use; controlled over QMP.

  blockd --device vda=disk.qcow2

serves disk.qcow2 with its backing chain of up to 64 images. It listens for QMP on ./blockd.qmp and for NBD on
./blockd.nbd, and says how to connect. Then, from another terminal:

  blockctl stream vda --wait                 make disk.qcow2 independent of its backing files
  blockctl switch vda copy.qcow2             go on in copy.qcow2, an overlay of disk.qcow2
  qemu-io -f raw -c 'read 0 4k' 'nbd+unix:///vda?socket=blockd.nbd'

For people:
  --device NAME=FILE[,format=FORMAT]         a disk on an image file, exported under its name; FORMAT (qcow2,
                                             qed, add-cow or raw) is needed unless the file's name ends in it,
                                             such as .qcow2, and its content agrees. blkstream:FILE copies
                                             on read. ,backing-format=FORMAT likewise says what the backing
                                             file is, where the image does not record it.
  --device id=NAME,node-name=NODE            a disk on a node that --blockdev defined
  --qmp PATH                                 listen for QMP on this unix socket
  --nbd PATH | HOST:PORT                     listen for NBD here
  --image-paths FOLDER                       let images name backing files in this folder; without it only
                                             in their own (may be given several times)
  --http PATH | HOST:PORT                    serve status and metrics here, read-only; HOST is loopback
  --config FILE.toml                         options from a file: its keys are the names of the options, its
                                             tables their values; FOLDERs and files as on the command line
  --check-config                             validate the options and the configuration file, then exit;
                                             opens no images
  --guest-latency MICROSECONDS               streams hold back while guests wait longer for a disk than this
                                             on the average: 5000 without it, 0 for never
  --nbd-poll MICROSECONDS                    stay awake for so long for a guest's next request while that
                                             makes answers faster: 200 without it, 0 for never (less CPU)
  --state-dir DIR                            remember disks, exports and jobs in this folder, and go on with
                                             them after a crash or a stop; see below
  --state-restore partial|strict             what to do if a part of that cannot be brought back: serve the
                                             rest (partial, the default), or do not start (strict)

As with qemu-storage-daemon, in the order given; VALUE is key=val,key.sub=val (a comma in a value is
written twice) or a JSON object:
  --blockdev [driver=]file,node-name=N,filename=F[,read-only=on|off][,auto-read-only=on|off]
  --blockdev [driver=]raw|qcow2,node-name=N,file=NODE|file.driver=file,file.filename=F
             [,backing=NODE|backing.driver=...][,read-only=on|off]
  --blockdev [driver=]copy-on-read|blkstream,node-name=N,file=NODE[,bottom=NODE]
  --blockdev [driver=]throttle,node-name=N,file=NODE,throttle-group=I
  --blockdev [driver=]faults|blkdebug,node-name=N,image=NODE[,inject-error.0.event=E]...[,config=FILE]
  --chardev  socket,id=I,path=P[,server=on]  a unix socket to listen on, or to connect to
  --chardev  socket,id=I,host=H,port=P[,server=on]
  --chardev  socket,id=I,fd=N[,server=on]    an inherited socket
  --chardev  stdio,id=I
  --monitor  [chardev=]I[,pretty=on]         speak QMP on a chardev
  --nbd-server addr.type=unix,addr.path=P[,max-connections=N]
  --nbd-server addr.type=inet,addr.host=H,addr.port=N
  --nbd-server addr.type=fd,addr.str=N
  --export   [type=]nbd,id=I,node-name=N[,name=X][,description=T][,writable=on|off]
                   [,writethrough=on|off][,allocation-depth=on|off]
  --object   throttle-group,id=I[,limits.iops-total=N][,limits.bps-write=N]...
  --object   secret|tls-creds-x509|iothread,id=I,...
  --pidfile  PATH                            written when everything is ready, removed at the end
  --daemonize                                go to the background when everything is ready

  -h, --help       show this help
  -V, --version    show the version

With --state-dir, DIR/journal.json says what is served and which jobs there are; it is on the disk before a
command is answered. Started again with DIR, blockd opens the images that are active by then, and jobs go on
under their ids, paused if they were; SIGTERM and `quit` leave jobs for the next start. Where the command line
and the journal differ the journal wins, with a warning; what the journal has never had is added. If
--state-dir is all there is, blockd listens for QMP where it did before. A disk, export or job that cannot be
brought back is left out with an error in the log, and listed by `query-left-out`; it stays in the journal,
and the next start tries again. `blockdev-del`, `block-export-del` and `job-dismiss` give it up. A new option
that names a node which is left out is left out too, with an error in the log.

Examples:
  blockd --device vda=disk.qcow2 --qmp /run/vm1.qmp --nbd /run/vm1.nbd
  blockd --blockdev file,node-name=f,filename=disk.qcow2 --blockdev qcow2,node-name=q,file=f \\
         --nbd-server addr.type=unix,addr.path=disk.nbd --export nbd,id=e,node-name=q,writable=on \\
         --chardev socket,id=c,path=disk.qmp,server=on,wait=off --monitor c

Under systemd: sockets of a .socket unit are used for what FileDescriptorName= says, qmp or nbd (and for NBD
if there is one and it says nothing); Type=notify works.

Exit status: 0 after quit, SIGTERM, SIGINT or SIGHUP; 1 when something is wrong, which is told on stderr.
At a stop that is an image that cannot be flushed or closed, acknowledged writes that are lost, or a journal
that cannot be written. Writes that --state-dir keeps for the next start are not lost.
"""
